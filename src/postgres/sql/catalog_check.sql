-- What speaks against the schema, if anything does: a text about the first object that somebody else has, or has changed,
-- and whether it is about trust, and not about the shape of what can be trusted. It looks into pg_catalog only, and so runs
-- no code of theirs.
WITH RECURSIVE own (oid) AS (
    SELECT role.oid FROM pg_roles AS role WHERE role.rolname = current_user
    UNION
    -- Not by pg_has_role: a superuser counts as a member of all there, and from 16 on one who made a role as a member of it.
    SELECT member.roleid FROM own JOIN pg_auth_members AS member ON member.member = own.oid
    WHERE coalesce(to_jsonb(member) ->> 'set_option', 'true') = 'true'
       OR to_jsonb(member) ->> 'inherit_option' = 'true'
), trusted (oid) AS (
    SELECT own.oid FROM own
    UNION SELECT base.datdba FROM pg_database AS base WHERE base.datname = current_database()
    UNION SELECT role.oid FROM pg_roles AS role WHERE role.rolsuper OR role.rolname = 'pg_database_owner'
), expected (name, kind, persistence, columns) AS (VALUES
    ('version', 'r', 'p', '{"sole bool","version int4"}'::text[]),
    ('token', 'S', 'p', NULL),
    ('era', 'r', 'u', '{"sole bool","since timestamptz","place text","server timestamptz"}'),
    ('lock', 'r', 'u', '{"id int8","pair bool","namespace text","key text","token int8","annotation bytea","pid int4","since timestamptz","readers int8"}'),
    ('resignation', 'r', 'u', '{"id int8","pair bool","token int8","asked timestamptz"}'),
    ('success', 'r', 'p', '{"namespace text","key text","started timestamptz"}'),
    ('semaphore', 'r', 'p', '{"id int8","namespace text","key text","permits int4","former int4","since timestamptz"}'),
    ('policy', 'r', 'p', '{"sole bool","takeover text","lease int8","quorum bool"}'),
    ('takeover', 'r', 'u', '{"sole bool","id uuid","base oid","server timestamptz","system int8","timeline int8","over bool","seen jsonb"}'),
    ('locks', 'v', 'p', NULL),
    ('semaphores', 'v', 'p', NULL),
    ('waiters', 'v', 'p', NULL)
), object AS MATERIALIZED (
    SELECT class.*, expected.kind, expected.persistence, expected.columns, quote_ident('dsync') || '.' || quote_ident(expected.name) AS called
    FROM expected JOIN pg_class AS class ON class.relname = expected.name
    JOIN pg_namespace AS schema ON schema.oid = class.relnamespace AND schema.nspname = 'dsync'
), fence AS MATERIALIZED (
    -- All of that name: a call may mean one that takes its argument in another type.
    SELECT proc.*, quote_ident('dsync') || '.fence(' || pg_get_function_identity_arguments(proc.oid) || ')' AS called
    FROM pg_proc AS proc JOIN pg_namespace AS schema ON schema.oid = proc.pronamespace AND schema.nspname = 'dsync'
    WHERE proc.proname = 'fence'
), part (classid, objid, called) AS (
    SELECT 'pg_class'::regclass, object.oid, object.called FROM object
    UNION ALL SELECT 'pg_class'::regclass, index.indexrelid, object.called
              FROM object JOIN pg_index AS index ON index.indrelid = object.oid
    UNION ALL SELECT 'pg_attrdef'::regclass, value.oid, object.called
              FROM object JOIN pg_attrdef AS value ON value.adrelid = object.oid
    UNION ALL SELECT 'pg_constraint'::regclass, rule.oid, object.called
              FROM object JOIN pg_constraint AS rule ON rule.conrelid = object.oid
    UNION ALL SELECT 'pg_rewrite'::regclass, rule.oid, object.called
              FROM object JOIN pg_rewrite AS rule ON rule.ev_class = object.oid
), problem (rank, text) AS (
    SELECT 1, 'the schema ' || quote_ident('dsync') || ' belongs to the role ' || quote_ident(pg_get_userbyid(schema.nspowner))
    FROM pg_namespace AS schema WHERE schema.nspname = 'dsync' AND schema.nspowner NOT IN (SELECT trusted.oid FROM trusted)
    UNION ALL
    SELECT 2, called || ' belongs to the role ' || quote_ident(pg_get_userbyid(relowner))
    FROM object WHERE relowner NOT IN (SELECT trusted.oid FROM trusted)
    UNION ALL
    SELECT 2, 'the function ' || called || ' belongs to the role ' || quote_ident(pg_get_userbyid(proowner))
    FROM fence WHERE proowner NOT IN (SELECT trusted.oid FROM trusted)
    UNION ALL
    SELECT 3, called || ' is not what the catalog of locks has under this name'
    FROM object WHERE relkind <> kind::"char" OR relpersistence <> persistence::"char"
    UNION ALL
    SELECT 10, called || ' has other columns than in the catalog of locks: ' || array_to_string(there.columns, ', ')
    FROM object CROSS JOIN LATERAL (
        SELECT array_agg(attname || ' ' || typname ORDER BY attnum) AS columns
        FROM pg_attribute JOIN pg_type AS type ON type.oid = atttypid WHERE attrelid = object.oid AND attnum > 0 AND NOT attisdropped) AS there
    -- The first two columns of the era are all that version 1 had, and the first eight of the locks those of version 4.
    WHERE there.columns <> object.columns
      AND NOT (there.columns = object.columns[:CASE object.relname WHEN 'era' THEN 2 WHEN 'lock' THEN 8 ELSE 0 END])
    UNION ALL
    SELECT 10, 'the function ' || called || ' is not the one that the catalog of locks has under this name'
    FROM fence WHERE prokind <> 'f' OR pronargs <> 1 OR proargtypes[0] <> 'text'::regtype OR prorettype <> 'void'::regtype
                  -- With quote_all_identifiers the names are in quotes.
                  OR prosecdef OR replace(array_to_string(proconfig, ';'), '"', '') IS DISTINCT FROM 'search_path=pg_catalog, pg_temp'
    UNION ALL
    SELECT 5, called || ' has the trigger ' || quote_ident(tgname)
    FROM object JOIN pg_trigger ON tgrelid = object.oid AND NOT tgisinternal
    UNION ALL
    SELECT 6, called || ' has the rule ' || quote_ident(rulename)
    FROM object JOIN pg_rewrite ON ev_class = object.oid AND (rulename <> '_RETURN' OR relkind <> 'v')
    UNION ALL
    SELECT 7, called || ' is a part of an inheritance'
    FROM object JOIN pg_inherits ON object.oid IN (inhrelid, inhparent)
    UNION ALL
    SELECT 8, part.called || ' uses what does not come with PostgreSQL: '
              || pg_describe_object(foreign_part.refclassid, foreign_part.refobjid, 0)
    -- What comes with it is pinned, and has no dependencies.
    FROM part JOIN pg_depend AS foreign_part ON foreign_part.classid = part.classid AND foreign_part.objid = part.objid
     AND foreign_part.refclassid IN ('pg_proc'::regclass, 'pg_type'::regclass, 'pg_operator'::regclass,
                                     'pg_opclass'::regclass, 'pg_opfamily'::regclass)
    UNION ALL
    SELECT 9, 'row security hides the rows of ' || called || ' from the role ' || quote_ident(current_user)
              || '; run ALTER TABLE ' || called || ' DISABLE ROW LEVEL SECURITY, or give the role BYPASSRLS'
    FROM object WHERE relkind = 'r' AND row_security_active(object.oid)
)
SELECT problem.text || CASE WHEN problem.rank IN (3, 10) THEN
           '; if it belongs to another application, choose another schema (Config::schema, DSYNC_SCHEMA)'
       WHEN problem.rank < 9 THEN
           ', by which the code of others could run with the rights of ' || quote_ident(current_user)
           || '; drop it if it is not wanted, give it to this role, to one that this role is a member of, to the owner of the '
           || 'database or to a superuser if it is, or choose another schema (Config::schema, DSYNC_SCHEMA)' ELSE '' END AS text, problem.rank < 10 AS about_trust
FROM problem ORDER BY problem.rank, problem.text LIMIT 1
