//! What the front and the keeper tell each other: frames on a socket, each a length and fields of text.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags};
use rustix::time::{ClockId, clock_gettime};

/// A moment on the clock that both processes read, which runs since the machine was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(Duration);

impl Moment {
    pub(super) fn now() -> Self {
        let now = clock_gettime(ClockId::Monotonic);
        Self(Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0)))
    }

    /// How long it takes until then; zero if it is over.
    pub(super) fn left(self) -> Duration {
        self.0.saturating_sub(Self::now().0)
    }

    pub(super) fn after(self, time: Duration) -> Self {
        Self(self.0.saturating_add(time))
    }
}

/// What the keeper tells the front.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ToFront {
    /// The lock is held until `deadline` at least: start the command, with these variables.
    Start { deadline: Moment, variables: Vec<(String, String)> },
    /// It is held until then at least.
    Deadline(Moment),
    /// It was lost, and the group was told to end. The text says why.
    Lost(String),
    /// For the user.
    Say(String),
    /// Nothing more comes. No code stands for the command's own.
    Done { code: Option<u8>, message: String },
}

/// What the front tells the keeper.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ToKeeper {
    /// The arguments of the command line.
    Begin(Vec<String>),
    /// The command is about to begin, as the leader of this process group, which was started at this time by the system's count.
    Started { leader: i32, begun: Option<u64> },
    /// The command was told to end, by a signal that came.
    Ending,
    /// The command has ended, and its group is gone.
    Ended { succeeded: bool },
}

impl ToFront {
    fn fields(&self) -> Vec<String> {
        let tagged = |tag: &str, text: &str| vec![tag.to_owned(), text.to_owned()];
        match self {
            Self::Start { deadline, variables } => {
                let variables = variables.iter().flat_map(|(name, value)| [name.clone(), value.clone()]);
                tagged("start", &number(*deadline)).into_iter().chain(variables).collect()
            }
            Self::Deadline(deadline) => tagged("deadline", &number(*deadline)),
            Self::Lost(why) => tagged("lost", why),
            Self::Say(text) => tagged("say", text),
            Self::Done { code, message } => {
                let code = code.map(|code| code.to_string()).unwrap_or_default();
                vec!["done".to_owned(), code, message.clone()]
            }
        }
    }

    /// `None` for what no keeper of this version says.
    pub(super) fn parse(fields: &[String]) -> Option<Self> {
        let (tag, rest) = fields.split_first()?;
        let first = rest.first()?;
        Some(match tag.as_str() {
            "start" => {
                let (pairs, _) = rest[1..].as_chunks::<2>();
                let variables = pairs.iter().map(|[name, value]| (name.clone(), value.clone())).collect();
                Self::Start { deadline: moment(first)?, variables }
            }
            "deadline" => Self::Deadline(moment(first)?),
            "lost" => Self::Lost(first.clone()),
            "say" => Self::Say(first.clone()),
            "done" => Self::Done { code: first.parse().ok(), message: rest.get(1)?.clone() },
            _ => return None,
        })
    }

    /// Tells it, unless the front has not listened for so long that there is no room. It looks at the deadline then.
    pub(super) fn send(&self, stream: &UnixStream) -> io::Result<()> {
        send(stream, &self.fields())
    }
}

impl ToKeeper {
    fn fields(&self) -> Vec<String> {
        match self {
            Self::Begin(arguments) => [vec!["begin".to_owned()], arguments.clone()].concat(),
            Self::Started { leader, begun } => {
                let begun = begun.map(|begun| begun.to_string()).unwrap_or_default();
                vec!["started".to_owned(), leader.to_string(), begun]
            }
            Self::Ending => vec!["ending".to_owned()],
            Self::Ended { succeeded } => vec!["ended".to_owned(), succeeded.to_string()],
        }
    }

    pub(super) fn parse(fields: &[String]) -> Option<Self> {
        let (tag, rest) = fields.split_first()?;
        Some(match tag.as_str() {
            "begin" => Self::Begin(rest.to_vec()),
            "started" => {
                Self::Started { leader: rest.first()?.parse().ok()?, begun: rest.get(1)?.parse().ok() }
            }
            "ending" => Self::Ending,
            "ended" => Self::Ended { succeeded: rest.first()?.parse().ok()? },
            _ => return None,
        })
    }

    pub(super) fn send(&self, stream: &UnixStream) -> io::Result<()> {
        send(stream, &self.fields())
    }
}

fn number(moment: Moment) -> String {
    moment.0.as_nanos().to_string()
}

fn moment(text: &str) -> Option<Moment> {
    text.parse().ok().map(|nanos| Moment(Duration::from_nanos(nanos)))
}

/// Waits until the other end has made room by listening, or is gone.
pub(super) fn wait_for_room(stream: &UnixStream, at_most: Duration) {
    // A pause that cannot be told of is none.
    let Ok(at_most) = Timespec::try_from(at_most) else { return };
    let _ = poll(&mut [PollFd::new(stream, PollFlags::OUT)], Some(&at_most));
}

fn send(mut stream: &UnixStream, fields: &[String]) -> io::Result<()> {
    // No argument and no variable has a NUL, and no message needs one.
    let text = fields.iter().map(|field| field.replace('\0', " ")).collect::<Vec<_>>().join("\0");
    let length = u32::try_from(text.len()).map_err(io::Error::other)?;
    let frame = [&length.to_be_bytes()[..], text.as_bytes()].concat();
    let sent = rustix::net::send(stream, &frame, SendFlags::DONTWAIT)?;
    // A part of a long one was taken; without the rest nothing could be understood any more.
    stream.write_all(&frame[sent..])
}

/// Makes frames of the bytes that come in.
#[derive(Debug, Default)]
pub(super) struct Frames(Vec<u8>);

impl Frames {
    /// The next frame, waiting for it; `None` at the end.
    pub(super) fn wait(&mut self, mut stream: &UnixStream) -> Option<Vec<String>> {
        let mut bytes = [0; 4096];
        loop {
            if let Some(frame) = self.next() {
                return Some(frame);
            }
            match stream.read(&mut bytes) {
                Ok(0) => return None,
                Ok(count) => self.0.extend(&bytes[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
    }

    /// Takes in all that has come, without waiting; `false` at the end.
    pub(super) fn take_in(&mut self, stream: &UnixStream) -> bool {
        let mut bytes = [0; 4096];
        loop {
            match rustix::net::recv(stream, &mut bytes[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return false,
                Ok((count, _)) => self.0.extend(&bytes[..count]),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return true,
                Err(_) => return false,
            }
        }
    }

    pub(super) fn next(&mut self) -> Option<Vec<String>> {
        let (length, rest) = self.0.split_first_chunk::<4>()?;
        let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
        let text = String::from_utf8_lossy(rest.get(..length)?).into_owned();
        self.0.drain(..4 + length);
        Some(text.split('\0').map(str::to_owned).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_heard() {
        let (here, there) = UnixStream::pair().unwrap();
        let variables = vec![("A".to_owned(), "b c\n".to_owned()), ("D".to_owned(), String::new())];
        let said = [
            ToFront::Start { deadline: Moment::now(), variables },
            ToFront::Deadline(Moment::now()),
            ToFront::Lost("why".to_owned()),
            ToFront::Say(String::new()),
            ToFront::Done { code: Some(75), message: "m".to_owned() },
            ToFront::Done { code: None, message: String::new() },
        ];
        let mut frames = Frames::default();
        for message in &said {
            message.send(&here).unwrap();
        }
        assert!(frames.take_in(&there));
        for message in &said {
            assert_eq!(ToFront::parse(&frames.next().unwrap()).as_ref(), Some(message));
        }
        let arguments = vec!["run".to_owned(), "a b".to_owned(), String::new()];
        let said = [
            ToKeeper::Begin(arguments),
            ToKeeper::Started { leader: 7, begun: Some(12) },
            ToKeeper::Started { leader: 8, begun: None },
            ToKeeper::Ending,
            ToKeeper::Ended { succeeded: true },
        ];
        for message in &said {
            message.send(&here).unwrap();
            assert_eq!(ToKeeper::parse(&frames.wait(&there).unwrap()).as_ref(), Some(message));
        }
        drop(here);
        assert!(!frames.take_in(&there));
        assert_eq!(frames.wait(&there), None);
    }

    #[test]
    fn nobody_waits_for_one_who_does_not_listen() {
        let (here, _there) = UnixStream::pair().unwrap();
        let message = ToFront::Say("x".repeat(1000));
        let error = (0..10_000).find_map(|_| message.send(&here).err());
        assert_eq!(error.unwrap().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn room_is_there_again_when_the_other_has_listened() {
        let (here, there) = UnixStream::pair().unwrap();
        let message = ToFront::Say("x".repeat(1000));
        while message.send(&here).is_ok() {}
        let patience = Duration::from_secs(60);
        let begun = Moment::now();
        wait_for_room(&here, Duration::from_millis(100));
        assert!(begun.after(Duration::from_millis(100)).left().is_zero(), "there was no room");
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| wait_for_room(&here, patience));
            Frames::default().take_in(&there);
            waits.join().unwrap();
        });
        assert!(!begun.after(patience).left().is_zero(), "nobody was woken");
        message.send(&here).unwrap();
    }
}
