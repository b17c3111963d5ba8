//! The framing of backend messages, fed in random pieces, against a reference that looks at the whole stream.
#![no_main]

use libfuzzer_sys::fuzz_target;

// By path: the module is private to the library, and needs nothing of it.
#[allow(dead_code, reason = "only the boundaries are looked at")]
#[path = "../../src/postgres/stream/framing.rs"]
mod framing;

use framing::Framing;

/// Whether the first `end` bytes of `stream` are whole messages, by the definition.
fn is_boundary(stream: &[u8], end: usize) -> bool {
    let mut start = 0;
    while start < end {
        let Some(header) = stream.get(start..start + 5) else { return false };
        let length = i32::from_be_bytes([header[1], header[2], header[3], header[4]]);
        if length < 4 {
            return false;
        }
        start += 1 + length as usize;
    }
    start == end
}

// The first byte says how many of the next are the lengths of the pieces; the last piece is the rest.
fuzz_target!(|data: &[u8]| {
    let Some((&count, data)) = data.split_first() else { return };
    let (pieces, stream) = data.split_at(data.len().min(usize::from(count)));
    let mut framing = Framing::new();
    let mut at = 0;
    assert!(framing.at_boundary());
    for piece in pieces.iter().map(|&piece| usize::from(piece)).chain([stream.len()]) {
        let end = stream.len().min(at + piece);
        framing.feed(&stream[at..end]);
        at = end;
        assert_eq!(framing.at_boundary(), is_boundary(&stream[..at], at), "after {at} bytes");
    }
});
