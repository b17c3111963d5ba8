-- The catalog of locks, version 7: fencing tokens, who holds which lock, who is asked to resign, when work succeeded last, how
-- many permits a semaphore has, and what a takeover of the server costs.
--
-- The library runs this itself where its role may create a schema. Where it may not, an administrator runs it, in the database
-- of the locks, and then, for each role that uses locks:
--
--     GRANT USAGE ON SCHEMA dsync TO role;
--     GRANT USAGE, UPDATE ON SEQUENCE dsync.token TO role;
--     GRANT SELECT, INSERT, UPDATE, DELETE ON dsync.lock, dsync.era, dsync.resignation, dsync.success, dsync.semaphore TO role;
--     GRANT SELECT, INSERT, UPDATE ON dsync.policy, dsync.takeover TO role;
--     GRANT SELECT ON dsync.version, dsync.locks, dsync.waiters, dsync.semaphores TO role;
--     GRANT EXECUTE ON FUNCTION dsync.fence(text) TO role;
--
-- A role that takes no locks, but does fenced writes, needs USAGE on the schema, and SELECT and UPDATE on dsync.lock. To call
-- dsync.fence it also needs EXECUTE on that, which all roles have unless it was taken from PUBLIC. For Run::record it
-- also needs SELECT, INSERT and UPDATE on dsync.success. One
-- that only looks, in psql say, needs USAGE on the schema, and SELECT on dsync.locks, dsync.waiters and dsync.semaphores; to see where the
-- sessions of other roles come from it also has to be a member of pg_read_all_stats.
--
-- Running it again does no harm, and brings a catalog of an older version up to date. Run it in one transaction (psql
-- --set ON_ERROR_STOP=1 --single-transaction). It stops where a role that its own does not trust has a hand in the schema: see its end.

-- The views below keep the operators that are found while they are made. Taken back at the end.
SET search_path = pg_catalog, pg_temp;

CREATE SCHEMA IF NOT EXISTS dsync;
COMMENT ON SCHEMA dsync IS 'Distributed locks: fencing tokens and annotations. The locks themselves are advisory locks.';

-- One row.
CREATE TABLE IF NOT EXISTS dsync.version (
    sole    bool PRIMARY KEY DEFAULT true CHECK (sole),
    version int4 NOT NULL
);

-- One sequence for all locks.
CREATE SEQUENCE IF NOT EXISTS dsync.token AS int8;

-- One row, which a crash or a promotion takes away since the table is unlogged. A server that crashes, or a standby that
-- takes its place, may not remember the last tokens given out; nor does a database that comes from a dump or a copy. So
-- there are no tokens before the row is there and names this file of this run of the server, which nothing takes along.
-- Writing it makes the sequence go on above all that can have been given out. No acquisition waits for a disk for that.
CREATE UNLOGGED TABLE IF NOT EXISTS dsync.era (
    sole   bool PRIMARY KEY DEFAULT true CHECK (sole),
    since  timestamptz NOT NULL DEFAULT now(),
    place  text,                         -- this table's file, in the folder of this database
    server timestamptz                   -- when the server was started
);
-- Version 1 had neither.
ALTER TABLE dsync.era ADD COLUMN IF NOT EXISTS place text, ADD COLUMN IF NOT EXISTS server timestamptz;

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
    readers     int8,                   -- the token again, if the newest term is shared; all that share the lock have this token
    PRIMARY KEY (id, pair)
) WITH (fillfactor = 50);               -- room to write the next term into the same page
-- Version 4 had none. A process of that version writes another token and leaves it, which says that the term is not shared.
ALTER TABLE dsync.lock ADD COLUMN IF NOT EXISTS readers int8;

-- One row for each lock whose holder was asked to resign. Apart from dsync.lock, whose rows fenced transactions and those who wait
-- for a lock keep for a while.
CREATE UNLOGGED TABLE IF NOT EXISTS dsync.resignation (
    id    int8        NOT NULL,         -- id and pair as in dsync.lock
    pair  bool        NOT NULL,
    token int8        NOT NULL,         -- of the term that was asked to end; of no meaning for any other
    asked timestamptz NOT NULL,
    PRIMARY KEY (id, pair)
);

-- When work that is done once a period began the last time that it succeeded, by this server's clock. Logged, unlike what goes with
-- the locks: a crash must not have the work of a night done by day. A row stays until forget_success deletes it.
CREATE TABLE IF NOT EXISTS dsync.success (
    namespace text        NOT NULL,
    key       text        NOT NULL,
    started   timestamptz NOT NULL,
    PRIMARY KEY (namespace, key)
);

-- How many permits each semaphore has. Logged: a crash must not undo a change. A permit is an advisory lock, and has a row in dsync.lock, with the
-- id of its semaphore, whose last ten bits are 0, and in these the number of the permit, from 1 to 1023.
CREATE TABLE IF NOT EXISTS dsync.semaphore (
    id        int8        PRIMARY KEY,
    namespace text        NOT NULL,
    key       text        NOT NULL,
    permits   int4        NOT NULL CHECK (permits BETWEEN 1 AND 1023),
    former    int4,                     -- what it was before it was changed: processes that say so go on, by the new number
    since     timestamptz NOT NULL      -- when it was agreed, or changed
);

-- After a takeover of the server nobody is granted a lock before all terms of before are over. One row, which all managers of the
-- database have agreed on. Logged, so that a restart and a promotion keep it. A manager raises the values, and never lowers
-- one; an operator does, by an UPDATE, when no manager wants more any longer.
CREATE TABLE IF NOT EXISTS dsync.policy (
    sole     bool PRIMARY KEY DEFAULT true CHECK (sole),
    takeover text NOT NULL CHECK (takeover IN ('immediate', 'after promotion', 'after any restart')),
    lease    int8 NOT NULL,              -- the longest that any manager has had, in milliseconds
    quorum   bool NOT NULL DEFAULT false -- whether the standbys confirm heartbeats
);

-- The run of the server that was seen last, and whether all terms of before it are over. One row, which a crash or a promotion takes
-- away since the table is unlogged.
CREATE UNLOGGED TABLE IF NOT EXISTS dsync.takeover (
    sole     bool PRIMARY KEY DEFAULT true CHECK (sole),
    id       uuid        NOT NULL,       -- another one each time
    base     oid         NOT NULL,       -- this database
    server   timestamptz NOT NULL,       -- when the server was started
    system   int8,                       -- its system identifier and its timeline; null where the role may not ask
    timeline int8,
    over     bool        NOT NULL,
    seen     jsonb       NOT NULL DEFAULT '{}' -- by machine, when a process there first saw that it is not: milliseconds since the machine's start, and that start
);
-- End of the objects of the takeover.

-- Who holds which lock now; of a shared one, each session that does. A row that was left behind by a term which is over is not shown; where
-- something else holds the advisory lock, token, annotation and since are null, and the latter two where it is shared. The backend's start
-- tells a process id that is used again. Of a semaphore, each permit that is held, and which one.
CREATE OR REPLACE VIEW dsync.locks AS
SELECT lock.namespace, lock.key,
       CASE WHEN term.holds OR held.mode = 'ShareLock' AND lock.readers = lock.token THEN lock.token END AS token,
       CASE WHEN term.holds THEN lock.annotation END AS annotation,
       held.pid, activity.usename AS role, activity.client_addr, activity.application_name,
       CASE WHEN term.holds THEN lock.since END AS since,
       lock.id, lock.pair, held.mode = 'ShareLock' AS shared,
       CASE WHEN semaphore.id IS NOT NULL THEN (lock.id & 1023)::int4 END AS permit
FROM dsync.lock AS lock
JOIN pg_locks AS held
  ON held.locktype = 'advisory' AND held.granted
 AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())
 AND (held.classid::int8 << 32 | held.objid::int8) = lock.id AND (held.objsubid = 2) = lock.pair
LEFT JOIN pg_stat_activity AS activity ON activity.pid = held.pid
LEFT JOIN dsync.semaphore AS semaphore
  ON semaphore.id = lock.id & ~1023::int8 AND NOT lock.pair AND semaphore.namespace = lock.namespace AND semaphore.key = lock.key
CROSS JOIN LATERAL (
    SELECT held.mode <> 'ShareLock' AND held.pid = lock.pid AND lock.readers IS DISTINCT FROM lock.token
       AND coalesce(activity.backend_start <= lock.since, true) AS holds
) AS term;

-- Who waits for which lock, first come first. `since` is when the session took its present place in the queue. Waiters for
-- a key that has never been held are not here, since nothing tells its name. One that has waited for longer than a slice waits for
-- the turnstile of the lock, which is an advisory lock too, behind those that wait for the lock; whether it wants to share the lock is not known then.
CREATE OR REPLACE VIEW dsync.waiters AS
SELECT lock.namespace, lock.key, waiter.pid, activity.usename AS role, activity.client_addr,
       activity.application_name, waiter.waitstart AS since,
       row_number() OVER (PARTITION BY lock.id, lock.pair ORDER BY turnstile, waiter.waitstart NULLS LAST, waiter.pid) AS place,
       lock.id, lock.pair, CASE WHEN NOT turnstile THEN waiter.mode = 'ShareLock' END AS shared
FROM pg_locks AS waiter
CROSS JOIN (VALUES (false), (true)) AS at (turnstile)
JOIN dsync.lock AS lock
  ON lock.id = (waiter.classid::int8 << 32 | waiter.objid::int8) # CASE WHEN turnstile THEN 1614237451651786676 ELSE 0 END
 AND lock.pair = (waiter.objsubid = 2)
LEFT JOIN pg_stat_activity AS activity ON activity.pid = waiter.pid
WHERE waiter.locktype = 'advisory' AND NOT waiter.granted
  AND waiter.database = (SELECT oid FROM pg_database WHERE datname = current_database());

-- The semaphores, how many of their permits are held, and how many sessions wait for one. The first of these has the turnstile, which is an
-- advisory lock, and looks for a permit; the others wait for the turnstile. Who holds which permit is in dsync.locks, who waits is not in
-- dsync.waiters.
CREATE OR REPLACE VIEW dsync.semaphores AS
SELECT semaphore.namespace, semaphore.key, semaphore.permits, count(found.permit) AS held, count(*) FILTER (WHERE found.waits) AS waiting,
       semaphore.former, semaphore.since, semaphore.id
FROM dsync.semaphore AS semaphore
LEFT JOIN (
    SELECT place.id, place.permit, place.permit IS NULL AS waits
    FROM pg_locks AS locks
    CROSS JOIN LATERAL (SELECT locks.classid::int8 << 32 | locks.objid::int8 AS id) AS number
    CROSS JOIN LATERAL (SELECT number.id & ~1023::int8 AS id, number.id & 1023 AS permit WHERE locks.granted
                        UNION ALL SELECT number.id # 1614237451651786676, NULL) AS place
    WHERE locks.locktype = 'advisory' AND locks.objsubid = 1 AND locks.mode = 'ExclusiveLock'
      AND locks.database = (SELECT oid FROM pg_database WHERE datname = current_database())
) AS found ON found.id = semaphore.id
GROUP BY semaphore.id;

-- The fence of a term for transactions in any language: SELECT dsync.fence('...') with the text that Term::fence_text gives. It keeps a
-- later term from beginning until the transaction ends. If one has begun, it raises an error of SQLSTATE ZDF01; for a text that is
-- none of a term, one of 22023. Above READ COMMITTED, a transaction that sees a state from before the term, or from before a later
-- one, gets 40001, which has it tried again; before the first term of its key there is no row to tell that by. It has the rights of its caller. As Term::fence, it bounds the pauses of the
-- transaction to the lease. A caller with an old token takes no lock, and so holds up nobody.
CREATE OR REPLACE FUNCTION dsync.fence(term text) RETURNS void LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $check$
DECLARE
    -- To match and to capture in one would take longer.
    part    text[] := CASE WHEN term ~ '^fence1:[0-9a-f]{16}:[np]:[0-9]{1,19}:[1-9][0-9]{0,9}$' THEN string_to_array(term, ':') END;
    of_id   int8 := ('x' || part[2])::bit(64)::int8;
    is_pair bool := part[3] = 'p';
    of_term int8 := part[4];
    own     text := current_setting('idle_in_transaction_session_timeout');
    pause   text := part[5];            -- the longest that is allowed, in milliseconds
BEGIN
    IF part IS NULL THEN
        RAISE EXCEPTION 'this is not the text of a term' USING ERRCODE = '22023',
            HINT = 'Give it what Term::fence_text() has returned, as a whole.';
    END IF;
    -- A tighter bound of the transaction's own stays.
    IF own::interval > '0' AND own::interval < (pause || ' ms')::interval THEN
        pause := own;
    END IF;
    PERFORM FROM dsync.lock AS lock
    CROSS JOIN LATERAL (                -- the fence lock's key, which is another one for readers
        SELECT of_id # CASE WHEN lock.readers = lock.token THEN 3348558819048214481 ELSE 7238262541130950497 END AS key
    ) AS gate
    WHERE lock.id = of_id AND lock.pair = is_pair
      AND CASE WHEN lock.token <> of_term THEN false
               WHEN set_config('idle_in_transaction_session_timeout', pause, true) IS NULL THEN false
               WHEN is_pair THEN pg_try_advisory_xact_lock_shared((gate.key >> 32)::int4, (gate.key << 32 >> 32)::int4)
               ELSE pg_try_advisory_xact_lock_shared(gate.key) END
    FOR SHARE OF lock;
    IF FOUND THEN
        RETURN;
    ELSIF row_security_active('dsync.lock') THEN
        RAISE EXCEPTION 'row security hides the rows of % from the role %', 'dsync.lock', quote_ident(current_user)
            USING ERRCODE = 'insufficient_privilege',
                  HINT = 'Disable row level security on that table, or give the role BYPASSRLS.';
    ELSIF current_setting('transaction_isolation') IN ('repeatable read', 'serializable') AND EXISTS (
        SELECT FROM dsync.lock AS lock WHERE lock.id = of_id AND lock.pair = is_pair AND lock.token < of_term) THEN
        RAISE EXCEPTION 'could not serialize access: the transaction sees a state from before the term' USING ERRCODE = '40001',
            HINT = 'Try the transaction again.';
    END IF;
    RAISE EXCEPTION 'the term is over: a later one has begun' USING ERRCODE = 'ZDF01',
        HINT = 'Roll back, and stop the work of this term.';
END $check$;

-- Before the first statement that could run code of somebody else's, and in one statement with it: psql goes on after an
-- error. Creating what is not there yet runs none.
