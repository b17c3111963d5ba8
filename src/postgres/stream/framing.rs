//! Where in the byte stream from the server one message ends and the next begins.

/// Follows the framing of the backend's messages, to know when a message of ours may be slipped in.
///
/// Every message is a type byte and a big-endian `i32` length, which counts itself but not the type byte. Bytes may
/// come split in any way; [`feed`](Self::feed) takes them as they come and [`at_boundary`](Self::at_boundary)
/// tells whether all messages so far are complete. The bodies are skipped, not looked at, so the cost is that of the
/// number of messages.
///
/// A length below 4 cannot be: the driver will fail on it, and from there on there is no boundary any more.
#[derive(Debug)]
pub(crate) struct Framing {
    state: State,
}

/// ```text
///   Header ──5 bytes──▶ Body ──all of it──▶ Header
///      └──length < 4──▶ Lost
/// ```
#[derive(Debug)]
enum State {
    /// In the five bytes of the header; `length` is what has come of the last four.
    Header { seen: u8, length: u32 },
    /// So many bytes of the body are still to come (never none).
    Body { left: u32 },
    /// The stream made no sense.
    Lost,
}

const START: State = State::Header { seen: 0, length: 0 };

impl Framing {
    /// At the start of a stream, which is a boundary.
    pub(crate) fn new() -> Self {
        Self { state: START }
    }

    /// Takes the next bytes that came from the server.
    pub(crate) fn feed(&mut self, mut bytes: &[u8]) {
        while let Some((&first, rest)) = bytes.split_first() {
            match &mut self.state {
                State::Header { seen, length } => {
                    if *seen > 0 {
                        *length = *length << 8 | u32::from(first);
                    }
                    *seen += 1;
                    bytes = rest;
                    if *seen == 5 {
                        // A negative length has the top bit set, and is as impossible as one that is too short.
                        self.state = match *length {
                            4 => START,
                            5..=0x7fff_ffff => State::Body { left: *length - 4 },
                            _ => State::Lost,
                        };
                    }
                }
                State::Body { left } => {
                    let taken = bytes.len().min(*left as usize);
                    bytes = &bytes[taken..];
                    // `taken` is at most `left`, so it fits.
                    *left -= taken as u32;
                    if *left == 0 {
                        self.state = START;
                    }
                }
                State::Lost => return,
            }
        }
    }

    /// Whether the bytes so far are whole messages.
    pub(crate) fn at_boundary(&self) -> bool {
        matches!(self.state, State::Header { seen: 0, .. })
    }

    /// How many of the next bytes belong to the message that has begun, as far as is known; 0 at a boundary.
    ///
    /// Who reads no more than that at a time comes by every boundary.
    pub(crate) fn to_boundary(&self) -> usize {
        match self.state {
            State::Header { seen: 0, .. } | State::Lost => 0,
            State::Header { seen, .. } => 5 - usize::from(seen),
            State::Body { left } => left as usize,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Framing;

    fn message(tag: u8, body: usize) -> Vec<u8> {
        let mut bytes = vec![tag];
        bytes.extend_from_slice(&(body as u32 + 4).to_be_bytes());
        bytes.resize(5 + body, 0xff);
        bytes
    }

    /// The boundaries of `stream` by the definition, without state.
    fn boundaries(stream: &[u8]) -> Vec<usize> {
        let mut at = vec![0];
        let mut start = 0;
        while let Some(header) = stream.get(start..start + 5) {
            let length = i32::from_be_bytes(header[1..5].try_into().unwrap());
            if length < 4 {
                break;
            }
            start += 1 + length as usize;
            if start > stream.len() {
                break;
            }
            at.push(start);
        }
        at
    }

    fn sample() -> Vec<u8> {
        [0, 1, 0, 7, 255, 256, 3].iter().flat_map(|&body| message(b'D', body)).collect()
    }

    #[test]
    fn boundaries_are_found_byte_by_byte() {
        let stream = sample();
        let expected = boundaries(&stream);
        let mut framing = Framing::new();
        for (at, byte) in stream.iter().enumerate() {
            assert_eq!(framing.at_boundary(), expected.contains(&at), "at {at}");
            framing.feed(std::slice::from_ref(byte));
        }
        assert!(framing.at_boundary());
    }

    #[test]
    fn every_split_in_three_gives_the_same_boundaries() {
        let stream = sample();
        let expected = boundaries(&stream);
        for first in 0..=stream.len() {
            for second in first..=stream.len() {
                let mut framing = Framing::new();
                framing.feed(&stream[..first]);
                assert_eq!(framing.at_boundary(), expected.contains(&first));
                framing.feed(&stream[first..second]);
                assert_eq!(framing.at_boundary(), expected.contains(&second));
                framing.feed(&stream[second..]);
                assert!(framing.at_boundary());
            }
        }
    }

    #[test]
    fn reading_to_the_boundary_stops_at_each() {
        let stream = sample();
        for start in 0..stream.len() {
            let mut framing = Framing::new();
            framing.feed(&stream[..start]);
            let mut at = start;
            while framing.to_boundary() > 0 {
                let end = at + framing.to_boundary();
                framing.feed(&stream[at..end]);
                at = end;
            }
            let expected = boundaries(&stream).into_iter().find(|&boundary| boundary >= start);
            assert_eq!(Some(at), expected, "from {start}");
        }
    }

    #[test]
    fn an_impossible_length_ends_the_tracking_for_good() {
        for length in [0_i32, 1, 3, -1, i32::MIN] {
            let mut framing = Framing::new();
            framing.feed(&message(b'Z', 1));
            framing.feed(b"X");
            framing.feed(&length.to_be_bytes());
            assert!(!framing.at_boundary(), "length {length}");
            framing.feed(&message(b'Z', 1));
            assert!(!framing.at_boundary(), "length {length}");
        }
    }

    #[test]
    fn the_longest_message_is_followed() {
        let mut framing = Framing::new();
        framing.feed(b"D\x7f\xff\xff\xff");
        let chunk = vec![0; 1 << 20];
        let mut left = i32::MAX as usize - 4;
        while left > 0 {
            assert!(!framing.at_boundary());
            let taken = left.min(chunk.len());
            framing.feed(&chunk[..taken]);
            left -= taken;
        }
        assert!(framing.at_boundary());
    }
}
