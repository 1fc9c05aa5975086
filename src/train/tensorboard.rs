//! Writes scalars that TensorBoard can show.
//!
//! An event file is a sequence of TFRecords: length (u64), masked CRC-32C of the length, data, masked CRC-32C of the
//! data, all little-endian (tensorflow/core/lib/io/record_writer.h). The data is a protocol buffer `Event`
//! (tensorboard/compat/proto/event.proto and summary.proto); the few fields that scalars need are encoded by hand.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};

/// An event file that is being written. What is buffered is written by [`flush`](Self::flush), and when it is dropped.
#[derive(Debug)]
pub struct EventWriter {
    file: BufWriter<File>,
    path: PathBuf,
}

impl EventWriter {
    /// Makes a new event file in `dir`, which is made if it is missing. A run that goes on at `start_step` > 0 tells
    /// TensorBoard to forget what earlier files of the folder say about that step and later ones (a session start, as
    /// `purge_step` of PyTorch's SummaryWriter).
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the folder or the file cannot be made or written.
    pub fn create(dir: &Path, start_step: i64) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        std::fs::create_dir_all(dir).map_err(|e| Error::io("make", dir, e))?;
        // TensorBoard reads a folder's files in the order of their names; a resumed run must come last even if the
        // clock was set back or the run was stopped within the same second.
        let seconds = now.as_secs().max(latest(dir)?.map_or(0, |last| last + 1));
        let path =
            dir.join(format!("events.out.tfevents.{seconds:010}.{}.{}", host_name(), std::process::id()));
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = BufWriter::new(file.map_err(|e| Error::io("make", &path, e))?);
        let mut writer = Self { file, path };
        for event in opening(start_step, now.as_secs_f64()) {
            writer.record(&event)?;
        }
        writer.flush()?;
        Ok(writer)
    }

    /// Appends one value of the curve `tag`; `wall_time` is in seconds since 1970.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the file cannot be written.
    pub fn scalar(&mut self, tag: &str, value: f32, step: i64, wall_time: f64) -> Result<()> {
        self.record(&scalar_event(tag, value, step, wall_time))
    }

    /// Hands everything so far to the operating system, so that TensorBoard sees it.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the file cannot be written.
    pub fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(|e| Error::io("write", &self.path, e))
    }

    /// The event file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn record(&mut self, event: &[u8]) -> Result<()> {
        self.file.write_all(&record(event)).map_err(|e| Error::io("write", &self.path, e))
    }
}

/// The largest time in the names of the event files in `dir`.
fn latest(dir: &Path) -> Result<Option<u64>> {
    let mut latest = None;
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io("list", dir, e))? {
        let name = entry.map_err(|e| Error::io("list", dir, e))?.file_name();
        let seconds = name.to_str().and_then(|n| n.strip_prefix("events.out.tfevents.")?.split('.').next());
        latest = latest.max(seconds.and_then(|s| s.parse::<u64>().ok()));
    }
    Ok(latest)
}

/// TensorBoard shows it nowhere, but its tools expect a name there.
fn host_name() -> String {
    match std::fs::read_to_string("/proc/sys/kernel/hostname") {
        Ok(name) if !name.trim().is_empty() => name.trim().replace(['/', '.'], "-"),
        Err(error) if error.kind() != ErrorKind::NotFound => "unreadable".to_string(),
        _ => "localhost".to_string(),
    }
}

/// One TFRecord.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut bytes = Vec::with_capacity(data.len() + 16);
    bytes.extend(length);
    bytes.extend(masked_crc(&length).to_le_bytes());
    bytes.extend(data);
    bytes.extend(masked_crc(data).to_le_bytes());
    bytes
}

/// The mask of tensorflow/core/lib/hash/crc32c.h: checksums of data that holds checksums would be weak.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// The events that begin a file: the version of the format, and where a resumed run goes on.
fn opening(start_step: i64, wall_time: f64) -> Vec<Vec<u8>> {
    let mut version = event(start_step, wall_time);
    bytes_field(&mut version, 3, b"brain.Event:2"); // file_version
    let mut events = vec![version];
    if start_step > 0 {
        let mut start = event(start_step, wall_time);
        bytes_field(&mut start, 7, &[1 << 3, 1]); // session_log { status: START }
        events.push(start);
    }
    events
}

fn scalar_event(tag: &str, value: f32, step: i64, wall_time: f64) -> Vec<u8> {
    let mut entry = Vec::new();
    bytes_field(&mut entry, 1, tag.as_bytes()); // tag
    // simple_value is a member of a oneof, which is written even when it is 0
    key(&mut entry, 2, WireType::Fixed32);
    entry.extend(value.to_le_bytes());
    let mut summary = Vec::new();
    bytes_field(&mut summary, 1, &entry); // repeated value
    let mut bytes = event(step, wall_time);
    bytes_field(&mut bytes, 5, &summary); // summary
    bytes
}

/// The fields that every event begins with; like any writer of proto3, it leaves out zeros.
fn event(step: i64, wall_time: f64) -> Vec<u8> {
    let mut bytes = Vec::new();
    if wall_time != 0.0 {
        key(&mut bytes, 1, WireType::Fixed64);
        bytes.extend(wall_time.to_le_bytes());
    }
    if step != 0 {
        key(&mut bytes, 2, WireType::Varint);
        varint(&mut bytes, step as u64); // int64: two's complement
    }
    bytes
}

/// The wire types of protocol buffers that occur here.
#[derive(Clone, Copy)]
enum WireType {
    Varint = 0,
    Fixed64 = 1,
    Bytes = 2,
    Fixed32 = 5,
}

fn key(bytes: &mut Vec<u8>, field: u64, wire_type: WireType) {
    varint(bytes, field << 3 | wire_type as u64);
}

fn bytes_field(bytes: &mut Vec<u8>, field: u64, content: &[u8]) {
    key(bytes, field, WireType::Bytes);
    varint(bytes, content.len() as u64);
    bytes.extend(content);
}

/// Seven bits a byte, low ones first.
fn varint(bytes: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by tensorboard's own record writer and protocol buffers: tests/fixtures/tensorboard/make.py.
    const BY_PYTHON: &[u8] = include_bytes!("../../tests/fixtures/tensorboard/resumed.tfevents");

    #[test]
    fn writes_the_bytes_that_tensorboards_own_writer_writes() {
        let mut bytes: Vec<u8> = opening(300, 1_700_000_000.25).iter().flat_map(|e| record(e)).collect();
        for (tag, value, step, wall_time) in [
            ("train/loss", 0.125, 300, 1_700_000_001.5),
            ("train/loss", 0.0, 0, 0.0),
            ("größe/nan", f32::NAN, i64::MAX, 1e-3),
            ("negative", -1.5e-30, -7, -2.0),
            (&"long".repeat(50), 3.0, 128, 1.0),
        ] {
            bytes.extend(record(&scalar_event(tag, value, step, wall_time)));
        }
        assert_eq!(bytes, BY_PYTHON);
    }

    #[test]
    fn a_later_file_of_a_folder_sorts_last() {
        let dir = tempfile::tempdir().expect("a scratch folder");
        let first = EventWriter::create(dir.path(), 0).expect("a scratch file");
        let second = EventWriter::create(dir.path(), 10).expect("a scratch file");
        assert!(first.path().file_name() < second.path().file_name());
        std::fs::write(dir.path().join("events.out.tfevents.9000000000.elsewhere.1.0"), "")
            .expect("a scratch file");
        let third = EventWriter::create(dir.path(), 10).expect("a scratch file");
        let name = third.path().file_name().expect("a name").to_string_lossy().into_owned();
        assert!(name.starts_with("events.out.tfevents.9000000001."), "{name}");
    }

    #[test]
    fn an_unusable_folder_is_named() {
        let dir = tempfile::tempdir().expect("a scratch folder");
        let file = dir.path().join("logs");
        std::fs::write(&file, "").expect("a scratch file");
        let message = EventWriter::create(&file, 0).expect_err("a file is no folder").to_string();
        assert!(message.starts_with(&format!("cannot make {}: ", file.display())), "{message}");
    }
}
