//! The statements of a fenced transaction. They run on connections of the application's.

use super::Shape;

/// Holds the row of a term while the caller's transaction lasts, if the term's token is still the newest: `$1` key,
/// `$2` whether it is a pair, `$3` token, `$4` the longest pause between two statements, in milliseconds.
///
/// `FOR SHARE` makes a successor's update wait; `FOR KEY SHARE` would not, since the update leaves the key alone. The
/// fence lock, taken before that, tells a successor of it without a wait; one that has the fence lock has the lock too, so the term is
/// over. The bound on pauses is what keeps a frozen writer from holding up its successor; a tighter one of the caller's
/// stays. It is set before anything is taken, and nothing is taken for a token that is known to be an old one: a caller that
/// is refused, and lets its transaction stand open, holds up nobody.
///
/// Runs on a connection of the application's, whose `search_path` may be anything. The function `fence` of the catalog does the same for
/// other languages.
pub(crate) fn fence(pair: bool) -> String {
    let (fence_lock, of_readers) = (Shape::plain(pair).fence_lock(), Shape::plain(pair).readers_fence_lock());
    format!(
        "SELECT true FROM dsync.lock AS lock, \
              (SELECT pg_catalog.current_setting('idle_in_transaction_session_timeout')::pg_catalog.interval AS now, \
                      ($4::pg_catalog.text OPERATOR(pg_catalog.||) ' ms')::pg_catalog.interval AS longest) AS pause \
         WHERE lock.id OPERATOR(pg_catalog.=) $1::pg_catalog.int8 AND lock.pair OPERATOR(pg_catalog.=) $2::pg_catalog.bool \
           AND CASE WHEN lock.token OPERATOR(pg_catalog.<>) $3::pg_catalog.int8 THEN false \
                    WHEN pg_catalog.set_config('idle_in_transaction_session_timeout', \
                             CASE WHEN pause.now OPERATOR(pg_catalog.>) '0'::pg_catalog.interval \
                                       AND pause.now OPERATOR(pg_catalog.<) pause.longest \
                                  THEN pg_catalog.current_setting('idle_in_transaction_session_timeout') \
                                  ELSE $4::pg_catalog.text END, true) IS NULL THEN false \
                    WHEN lock.readers OPERATOR(pg_catalog.=) lock.token \
                    THEN pg_catalog.pg_try_advisory_xact_lock_shared({of_readers}) \
                    ELSE pg_catalog.pg_try_advisory_xact_lock_shared({fence_lock}) END \
         FOR SHARE OF lock"
    )
}

/// Whether the term with this token is the newest: `$1` key, `$2` whether it is a pair, `$3` token. And whether row security
/// may hide its row. Runs where [`fence`] does.
pub(crate) const IS_CURRENT: &str = "SELECT EXISTS (SELECT FROM dsync.lock AS lock \
     WHERE lock.id OPERATOR(pg_catalog.=) $1::pg_catalog.int8 AND lock.pair OPERATOR(pg_catalog.=) $2::pg_catalog.bool \
       AND lock.token OPERATOR(pg_catalog.=) $3::pg_catalog.int8), \
     pg_catalog.row_security_active('dsync.lock')";

/// Whether row security may have hidden the row for which [`fence`] looked in vain. Runs where that does.
pub(crate) const IS_HIDDEN: &str = "SELECT pg_catalog.row_security_active('dsync.lock')";
