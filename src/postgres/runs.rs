//! What a manager knows of the runs of servers that its sessions are on. It may have sessions on two, which both say that they are the primary.

/// Something for each run.
#[derive(Debug)]
pub(crate) struct Runs<T>(Vec<(String, T)>);

impl<T> Default for Runs<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Default> Runs<T> {
    /// What is known of this run.
    pub(crate) fn of(&mut self, run: &str) -> &mut T {
        /// More than there can be servers of one manager. The first of them are over.
        const MOST: usize = 8;
        let index = self.0.iter().position(|(known, _)| known == run).unwrap_or_else(|| {
            if self.0.len() == MOST {
                self.0.remove(0);
            }
            self.0.push((run.to_owned(), T::default()));
            self.0.len() - 1
        });
        &mut self.0[index].1
    }

    /// Forgets all.
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_run_has_its_own_and_the_oldest_are_forgotten() {
        let mut runs = Runs::<u32>::default();
        for number in 0..10 {
            *runs.of(&format!("run {number}")) = number;
        }
        let known: Vec<_> = (0..10).rev().map(|number| *runs.of(&format!("run {number}"))).collect();
        assert_eq!(known, [9, 8, 7, 6, 5, 4, 3, 2, 0, 0]);
        runs.clear();
        assert_eq!(*runs.of("run 9"), 0);
    }
}
