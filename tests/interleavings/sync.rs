//! What `src/sync.rs` has, by loom.

use std::ops::{Deref, DerefMut};

pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// A mutex without poison. As with the real one, a try that fails has seen that another thread has it, and no more: it may
/// have read what is not true any more, unless that thread's unlocking is known to have happened before. Loom's own mutex
/// says at once when it is free. What is tried is only tried, and not waited for.
#[derive(Debug, Default)]
pub(crate) struct Mutex<T> {
    taken: AtomicBool,
    inside: loom::sync::Mutex<T>,
}

#[derive(Debug)]
pub(crate) struct MutexGuard<'a, T> {
    taken: Option<&'a AtomicBool>,
    inside: loom::sync::MutexGuard<'a, T>,
}

impl<T> Mutex<T> {
    pub(crate) fn new(inside: T) -> Self {
        Self { taken: AtomicBool::new(false), inside: loom::sync::Mutex::new(inside) }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard { taken: None, inside: self.inside.lock().unwrap() }
    }

    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        if self.taken.load(Ordering::Relaxed) {
            return None;
        }
        let inside = self.inside.try_lock().ok()?;
        self.taken.store(true, Ordering::Relaxed);
        Some(MutexGuard { taken: Some(&self.taken), inside })
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        // Loom changes threads here, and not where its own guard is dropped.
        if let Some(taken) = self.taken {
            taken.store(false, Ordering::Release);
        }
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inside
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inside
    }
}
