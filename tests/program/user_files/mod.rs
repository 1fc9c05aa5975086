//! What people have on their disks and type, and what they should get: a test for each case, named by what the user had.

mod commands;
mod pictures;
