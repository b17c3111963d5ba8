//! What the library's files name that is not tried: as little of it as they need.

pub(crate) mod key {
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct AdvisoryKey(pub(crate) i64);
}

pub(crate) mod context {
    use std::convert::Infallible;
    use std::time::Instant;

    use crossbeam_channel::{Receiver, never};

    pub(crate) use crate::cancellation::OnCancel;

    pub(crate) struct Context;

    impl Context {
        pub(crate) fn cancelled(&self) -> Receiver<Infallible> {
            never()
        }

        pub(crate) fn expires_at(&self) -> Option<Instant> {
            None
        }
    }
}

pub(crate) mod term {
    use std::sync::Arc;

    use crate::expiry::Expiry;
    use crate::loss::Lost;

    pub(crate) trait Fence {}

    pub(crate) struct Term;

    impl Term {
        pub(crate) fn new(_: Lost, _: Option<i64>, _: Option<Arc<dyn Fence>>) -> Self {
            Self
        }

        pub(crate) fn with_permit(self, _: Option<u32>) -> Self {
            self
        }

        pub(crate) fn with_expiry(self, _: Arc<Expiry>) -> Self {
            self
        }

        pub(crate) fn with_warning(self, _: crossbeam_channel::Receiver<std::convert::Infallible>) -> Self {
            self
        }
    }
}

pub(crate) mod spec {
    #[derive(Debug)]
    pub(crate) struct LockSpec;
}

pub(crate) mod stream {
    use std::sync::Arc;

    use crate::alarm::Bell;
    use crate::bell::{ModelBell, never};

    #[derive(Debug)]
    pub(crate) struct Socket;

    /// A stream on which nothing comes but its end.
    #[derive(Clone, Debug)]
    pub(crate) struct StreamControl(Arc<ModelBell>);

    impl StreamControl {
        pub(crate) fn new() -> Self {
            Self(Arc::new(ModelBell::new()))
        }

        pub(crate) fn kill(&self) {
            self.0.ring();
        }

        pub(crate) fn socket(&self) -> Option<Socket> {
            None
        }

        /// Blocks until it is killed.
        pub(crate) fn read(&self) {
            self.0.wait(never(), None);
        }
    }
}

pub(crate) mod session {
    pub(crate) mod machine {
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Confirms {
            Nothing,
            All,
        }
    }

    pub(crate) mod control {
        use std::time::Instant;

        use super::super::stream::StreamControl;

        #[derive(Debug)]
        pub(crate) struct SessionControl(StreamControl);

        impl SessionControl {
            pub(crate) fn interrupt(&self, _: Instant) {
                self.kill();
            }

            pub(crate) fn slice(&self) -> Option<u64> {
                Some(1)
            }

            pub(crate) fn cancel_slice(&self, _: u64, _: Instant) -> bool {
                self.kill();
                true
            }

            pub(crate) fn kill(&self) -> bool {
                self.0.kill();
                true
            }

            pub(crate) fn stream(&self) -> &StreamControl {
                &self.0
            }
        }
    }
}
