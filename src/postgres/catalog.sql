-- The catalog of dsync, version 1: fencing tokens, and who holds which lock.
--
-- dsync runs this itself where its role may create a schema. Where it may not, an administrator runs it, and then, for
-- each role that uses locks:
--
--     GRANT USAGE ON SCHEMA dsync TO role;
--     GRANT USAGE ON SEQUENCE dsync.token TO role;
--     GRANT SELECT, INSERT, UPDATE, DELETE ON dsync.lock TO role;
--     GRANT SELECT ON dsync.version, dsync.locks, dsync.waiters TO role;
--
-- Running it again does no harm.

CREATE SCHEMA IF NOT EXISTS dsync;
COMMENT ON SCHEMA dsync IS 'Distributed locks: fencing tokens and annotations. The locks themselves are advisory locks.';

CREATE TABLE IF NOT EXISTS dsync.version (version int4 NOT NULL);
INSERT INTO dsync.version SELECT 1 WHERE NOT EXISTS (SELECT FROM dsync.version);

-- One sequence for all locks. Sequences are written ahead, so that no token comes twice, not after a crash either.
CREATE SEQUENCE IF NOT EXISTS dsync.token AS int8;

-- One row for each lock that has been held. Unlogged, since advisory locks are not kept over a crash either.
CREATE UNLOGGED TABLE IF NOT EXISTS dsync.lock (
    id          int8        NOT NULL,   -- the advisory lock's key; of a pair, the first number is the upper half
    pair        bool        NOT NULL,   -- whether the key is a pair
    namespace   text        NOT NULL,
    key         text        NOT NULL,
    token       int8        NOT NULL,   -- the fencing token of the newest term
    annotation  bytea,
    pid         int4        NOT NULL,   -- the backend of the newest term
    since       timestamptz NOT NULL,
    PRIMARY KEY (id, pair)
) WITH (fillfactor = 50);               -- room to write the next term into the same page

-- Who holds which lock now. A row that was left behind by a term which is over is not shown.
CREATE OR REPLACE VIEW dsync.locks AS
SELECT lock.namespace, lock.key, lock.token, lock.annotation, held.pid, activity.usename AS role,
       activity.client_addr, activity.application_name, lock.since, lock.id, lock.pair
FROM dsync.lock
JOIN pg_catalog.pg_locks AS held
  ON held.locktype = 'advisory' AND held.granted AND held.pid = lock.pid
 AND held.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
 AND held.classid::int8 << 32 | held.objid::int8 = lock.id AND (held.objsubid = 2) = lock.pair
LEFT JOIN pg_catalog.pg_stat_activity AS activity ON activity.pid = held.pid;

-- Who waits for which lock, first come first.
CREATE OR REPLACE VIEW dsync.waiters AS
SELECT lock.namespace, lock.key, waiter.pid, activity.usename AS role, activity.client_addr,
       activity.application_name, waiter.waitstart AS since,
       row_number() OVER (PARTITION BY lock.id, lock.pair ORDER BY waiter.waitstart NULLS LAST) AS place,
       lock.id, lock.pair
FROM dsync.lock
JOIN pg_catalog.pg_locks AS waiter
  ON waiter.locktype = 'advisory' AND NOT waiter.granted
 AND waiter.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
 AND waiter.classid::int8 << 32 | waiter.objid::int8 = lock.id AND (waiter.objsubid = 2) = lock.pair
LEFT JOIN pg_catalog.pg_stat_activity AS activity ON activity.pid = waiter.pid;
