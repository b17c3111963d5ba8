//! The tree of what is cancelled together.

use std::convert::Infallible;
use std::sync::{Arc, Weak};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::sync::{AtomicUsize, Mutex, Ordering::SeqCst};

/// A point of cancellation. The sender's end is dropped to cancel, which disconnects every receiver at once.
///
/// Contexts may be derived from one another any number of times, so nothing here recurses along a chain of them.
pub(crate) struct Node {
    /// Keeps the way down from the ancestors, who know their children weakly only.
    pub(crate) parent: Option<Arc<Node>>,
    /// How many cancellers there are. None comes back once they are gone.
    pub(crate) cancellers: AtomicUsize,
    pub(crate) state: Mutex<NodeState>,
    done: Receiver<Infallible>,
}

pub(crate) struct NodeState {
    /// `None` once cancelled.
    alive: Option<Sender<Infallible>>,
    pub(crate) children: Vec<Child>,
}

/// What ends with a node.
pub(crate) enum Child {
    Node(Weak<Node>),
    Hook(Weak<dyn OnCancel>),
}

impl Child {
    fn is_gone(&self) -> bool {
        match self {
            Self::Node(node) => node.strong_count() == 0,
            Self::Hook(hook) => hook.strong_count() == 0,
        }
    }
}

/// Something to be told of a cancellation.
pub(crate) trait OnCancel: Send + Sync {
    /// The context was cancelled. Runs on the canceller's thread, so it must not block.
    fn cancelled(&self);
}

impl Node {
    pub(crate) fn new(parent: Option<Arc<Self>>) -> Arc<Self> {
        let (alive, done) = bounded(0);
        Arc::new(Self {
            parent,
            cancellers: AtomicUsize::new(1),
            state: Mutex::new(NodeState { alive: Some(alive), children: Vec::new() }),
            done,
        })
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.state.lock().alive.is_none()
    }

    /// Disconnects when it is cancelled.
    pub(crate) fn done(&self) -> &Receiver<Infallible> {
        &self.done
    }

    /// Whether it was cancelled, or somebody can still cancel it. In this order: the last canceller may cancel and be
    /// dropped in between.
    pub(crate) fn may_end_before_its_parent(&self) -> bool {
        self.cancellers.load(SeqCst) > 0 || self.is_cancelled()
    }

    /// Makes `child` end with this node; at once, if this one has ended already.
    pub(crate) fn adopt(&self, child: Child) {
        let mut state = self.state.lock();
        if state.alive.is_some() {
            // A long-lived parent must not keep an entry for every short-lived child it ever had: forget the dead ones
            // whenever the list would grow.
            if state.children.len() == state.children.capacity() {
                state.children.retain(|child| !child.is_gone());
                // So that it is not looked through for each of many that live.
                let alive = state.children.len();
                state.children.reserve(alive);
            }
            state.children.push(child);
        } else {
            drop(state);
            Self::end_all(vec![child]);
        }
    }

    pub(crate) fn cancel(&self) {
        Self::end_all(self.end());
    }

    fn end_all(mut descendants: Vec<Child>) {
        while let Some(descendant) = descendants.pop() {
            match descendant {
                Child::Node(node) => {
                    if let Some(node) = node.upgrade() {
                        descendants.append(&mut node.end());
                    }
                }
                Child::Hook(hook) => {
                    if let Some(hook) = hook.upgrade() {
                        hook.cancelled();
                    }
                }
            }
        }
    }

    /// Ends this node alone; gives the children, which are to be ended next.
    fn end(&self) -> Vec<Child> {
        let mut state = self.state.lock();
        state.alive = None;
        std::mem::take(&mut state.children)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let mut parent = self.parent.take();
        while let Some(node) = parent {
            // The last owner of a node takes its parent out of it, so that the node's own drop does not recurse.
            parent = Arc::into_inner(node).and_then(|mut node| node.parent.take());
        }
    }
}
