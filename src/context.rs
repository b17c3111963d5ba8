//! How long a call may wait: a deadline, a cancellation from another thread, or both.

use std::convert::Infallible;
use std::fmt;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, never};

pub(crate) use crate::cancellation::OnCancel;
use crate::cancellation::{Child, Node};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Ordering::SeqCst;

/// Bounds the wait of a call by time, by cancellation, or by both.
///
/// A context is cheap to clone and may be shared between threads. One made from another inherits its bounds: it ends no
/// later than its parent, and cancelling the parent cancels it too. A context never ends a *claim*: see
/// [`Lock::lock`](crate::Lock::lock).
///
/// ```
/// use std::time::Duration;
/// use dsync::{Context, ErrorKind};
///
/// let (shutdown, canceller) = Context::background().with_cancel();
/// let attempt = shutdown.with_timeout(Duration::from_secs(5));
/// assert!(attempt.check().is_ok());
///
/// canceller.cancel();
/// assert_eq!(attempt.check().unwrap_err().kind(), ErrorKind::Cancelled);
/// ```
#[derive(Clone)]
pub struct Context {
    deadline: Option<Instant>,
    node: Option<Arc<Node>>,
}

/// Cancels the [`Context`] it was made with, and all contexts made from that one.
///
/// May be cloned and used from any thread. Dropping it cancels nothing.
pub struct Canceller {
    node: Arc<Node>,
}

impl Context {
    /// A context without a deadline that nobody can cancel.
    pub fn background() -> Self {
        Self { deadline: None, node: None }
    }

    /// A context that ends when `timeout` has passed from now. A timeout too large for the clock never ends.
    pub fn timeout(timeout: Duration) -> Self {
        Self::background().with_timeout(timeout)
    }

    /// A context that ends at `deadline`.
    pub fn deadline(deadline: Instant) -> Self {
        Self::background().with_deadline(deadline)
    }

    /// A context like this one that ends when `timeout` has passed from now, if this one does not end before.
    #[must_use]
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        match Instant::now().checked_add(timeout) {
            Some(deadline) => self.with_deadline(deadline),
            None => self.clone(),
        }
    }

    /// A context like this one that ends at `deadline`, if this one does not end before.
    #[must_use]
    pub fn with_deadline(&self, deadline: Instant) -> Self {
        let deadline = self.deadline.map_or(deadline, |own| own.min(deadline));
        Self { deadline: Some(deadline), node: self.node.clone() }
    }

    /// A context like this one that can also be cancelled by itself.
    #[must_use]
    pub fn with_cancel(&self) -> (Self, Canceller) {
        // A context whose own canceller is gone ends when its parent does. So it is passed over, and a loop that derives
        // each context from the one before does not make a chain.
        let mut parent = self.node.as_ref();
        while let Some(node) = parent
            && !node.may_end_before_its_parent()
        {
            parent = node.parent.as_ref();
        }
        let node = Node::new(parent.cloned());
        if let Some(parent) = parent {
            parent.adopt(Child::Node(Arc::downgrade(&node)));
        }
        (Self { deadline: self.deadline, node: Some(Arc::clone(&node)) }, Canceller { node })
    }

    /// A context like this one, but for its deadline.
    pub(crate) fn with_deadline_instead(&self, deadline: Instant) -> Self {
        Self { deadline: Some(deadline), node: self.node.clone() }
    }

    /// When this context ends by itself, if it does.
    pub fn expires_at(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether there is, or was, anybody who can cancel it.
    pub(crate) fn can_be_cancelled(&self) -> bool {
        self.node.is_some()
    }

    /// Tells `hook` when this context is cancelled, for as long as somebody keeps it; at once if that has happened.
    pub(crate) fn on_cancel(&self, hook: Weak<dyn OnCancel>) {
        if let Some(node) = &self.node {
            node.adopt(Child::Hook(hook));
        }
    }

    /// A channel that disconnects when this context is cancelled; for use in `select!`. It does not tell of the
    /// deadline. Keep the context for as long as you listen: the channel also disconnects when the context, its clones and
    /// its cancellers are all gone.
    pub fn cancelled(&self) -> Receiver<Infallible> {
        self.node.as_ref().map_or_else(never, |node| node.done().clone())
    }

    /// Fails if this context has ended.
    ///
    /// # Errors
    /// [`Cancelled`](ErrorKind::Cancelled) or [`TimedOut`](ErrorKind::TimedOut).
    pub fn check(&self) -> Result<()> {
        match self.ended() {
            None => Ok(()),
            Some(ErrorKind::Cancelled) => Err(Error::new(ErrorKind::Cancelled, "the context was cancelled")),
            Some(kind) => Err(Error::new(kind, "the context's deadline has passed")),
        }
    }

    /// How this context has ended, if it has: `Cancelled` or `TimedOut`.
    pub(crate) fn ended(&self) -> Option<ErrorKind> {
        if self.node.as_ref().is_some_and(|node| node.is_cancelled()) {
            return Some(ErrorKind::Cancelled);
        }
        let passed = self.deadline.is_some_and(|deadline| deadline <= Instant::now());
        passed.then_some(ErrorKind::TimedOut)
    }
}

/// A context that ends when the time has passed from now.
impl From<Duration> for Context {
    fn from(timeout: Duration) -> Self {
        Self::timeout(timeout)
    }
}

/// A context that ends at that time.
impl From<Instant> for Context {
    fn from(deadline: Instant) -> Self {
        Self::deadline(deadline)
    }
}

impl From<&Context> for Context {
    fn from(context: &Context) -> Self {
        context.clone()
    }
}

impl Default for Context {
    fn default() -> Self {
        Self::background()
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let cancelled = self.node.as_ref().is_some_and(|node| node.is_cancelled());
        f.debug_struct("Context").field("left", &left).field("cancelled", &cancelled).finish()
    }
}

impl Canceller {
    /// Ends the context and its descendants, at once and for good. Calling it again does nothing.
    pub fn cancel(&self) {
        self.node.cancel();
    }
}

impl Clone for Canceller {
    fn clone(&self) -> Self {
        self.node.cancellers.fetch_add(1, SeqCst);
        Self { node: Arc::clone(&self.node) }
    }
}

impl Drop for Canceller {
    fn drop(&mut self) {
        self.node.cancellers.fetch_sub(1, SeqCst);
    }
}

impl fmt::Debug for Canceller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Canceller").field("cancelled", &self.node.is_cancelled()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::RecvTimeoutError;

    fn is_cancelled(context: &Context) -> bool {
        context.cancelled().try_recv() == Err(crossbeam_channel::TryRecvError::Disconnected)
    }

    #[test]
    fn a_child_ends_no_later_than_its_parent() {
        let parent = Context::timeout(Duration::from_secs(10));
        assert_eq!(parent.with_timeout(Duration::from_secs(60)).expires_at(), parent.expires_at());
        assert!(parent.with_timeout(Duration::from_secs(1)).expires_at() < parent.expires_at());
        assert_eq!(Context::timeout(Duration::MAX).expires_at(), None);
    }

    #[test]
    fn cancelling_a_parent_cancels_children_and_not_the_other_way() {
        let (parent, cancel_parent) = Context::background().with_cancel();
        let (child, cancel_child) = parent.with_timeout(Duration::from_secs(60)).with_cancel();
        let (sibling, _keep) = parent.with_cancel();
        cancel_child.cancel();
        assert!(is_cancelled(&child) && !is_cancelled(&parent) && !is_cancelled(&sibling));
        cancel_parent.cancel();
        cancel_parent.cancel();
        assert!(is_cancelled(&parent) && is_cancelled(&sibling));
        let (late, _keep) = parent.with_cancel();
        assert_eq!(late.check().unwrap_err().kind(), ErrorKind::Cancelled);
    }

    #[test]
    fn a_cancel_reaches_a_grandchild_whose_parent_is_gone() {
        let (root, canceller) = Context::background().with_cancel();
        let leaf = root.with_cancel().0.with_cancel().0;
        assert!(leaf.check().is_ok() && !is_cancelled(&leaf));
        canceller.cancel();
        assert!(is_cancelled(&leaf));
    }

    #[test]
    fn dropping_a_canceller_cancels_nothing() {
        let (context, canceller) = Context::background().with_cancel();
        drop(canceller);
        assert!(context.check().is_ok());
        assert_eq!(
            context.cancelled().recv_timeout(Duration::from_millis(1)),
            Err(RecvTimeoutError::Timeout)
        );
    }

    const DEEP: usize = 1_000_000;

    /// Runs on a stack that a recursion of some hundred calls would overflow, which would abort the process.
    fn on_a_small_stack(work: impl FnOnce() + Send + 'static) {
        std::thread::Builder::new().stack_size(64 * 1024).spawn(work).unwrap().join().unwrap();
    }

    /// A context that was derived a million times over, and the cancellers on the way, so that none is passed over.
    fn deep(root: &Context) -> (Context, Vec<Canceller>) {
        let (mut leaf, mut cancellers) = (root.clone(), Vec::with_capacity(DEEP));
        for _ in 0..DEEP {
            let (next, canceller) = leaf.with_cancel();
            leaf = next;
            cancellers.push(canceller);
        }
        (leaf, cancellers)
    }

    #[test]
    fn a_cancel_reaches_a_context_that_was_derived_a_million_times() {
        on_a_small_stack(|| {
            let (root, canceller) = Context::background().with_cancel();
            let (leaf, _cancellers) = deep(&root);
            canceller.cancel();
            assert!(is_cancelled(&leaf));
        });
    }

    #[test]
    fn dropping_a_context_that_was_derived_a_million_times_needs_no_deep_stack() {
        on_a_small_stack(|| {
            let (leaf, cancellers) = deep(&Context::background());
            drop(cancellers);
            assert!(leaf.check().is_ok());
            drop(leaf);
        });
    }

    #[test]
    fn a_context_without_a_canceller_of_its_own_adds_nothing_to_a_chain() {
        let (root, canceller) = Context::background().with_cancel();
        let mut leaf = root.clone();
        for _ in 0..1_000 {
            leaf = leaf.with_timeout(Duration::from_secs(60)).with_cancel().0;
        }
        let parent = leaf.node.as_ref().unwrap().parent.as_ref().unwrap();
        assert!(Arc::ptr_eq(parent, root.node.as_ref().unwrap()));
        canceller.cancel();
        assert!(is_cancelled(&leaf));

        let (cancelled, canceller) = Context::background().with_cancel();
        canceller.cancel();
        drop(canceller);
        assert!(is_cancelled(&cancelled.with_cancel().0), "what has ended is not passed over");
    }

    #[test]
    fn a_passed_deadline_is_a_timeout() {
        assert_eq!(Context::timeout(Duration::ZERO).check().unwrap_err().kind(), ErrorKind::TimedOut);
        assert!(Context::background().check().is_ok());
    }

    #[test]
    fn a_parent_forgets_children_that_are_gone() {
        let (parent, canceller) = Context::background().with_cancel();
        for _ in 0..10_000 {
            drop(parent.with_cancel());
        }
        assert!(canceller.node.state.lock().children.capacity() < 64);
    }
}
