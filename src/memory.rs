//! What is told when memory runs out where nothing can be returned: Rust and C++ then abort, and say so in their own words.

use hra::error::OUT_OF_MEMORY;
use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

/// The system's allocator, which notes a refusal.
struct Watched;

#[global_allocator]
static ALLOCATOR: Watched = Watched;

/// Whether memory was refused to Rust, and none was given since: then a refusal that was dealt with is not what ends the process.
static REFUSED: AtomicBool = AtomicBool::new(false);

/// What C++ did before with an exception that nobody catches: it tells what it is.
static BEFORE: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

fn noted(block: *mut u8) -> *mut u8 {
    if block.is_null() != REFUSED.load(Ordering::Relaxed) {
        REFUSED.store(block.is_null(), Ordering::Relaxed);
    }
    block
}

// SAFETY: every call is the system allocator's, with the same arguments.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        noted(unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        noted(unsafe { System.alloc_zeroed(layout) })
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        noted(unsafe { System.realloc(block, layout, size) })
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        unsafe { System.dealloc(block, layout) }
    }
}

unsafe extern "C" {
    // Of the C++ runtime that libtorch is linked to.
    #[link_name = "_ZSt13set_terminatePFvvE"]
    fn set_terminate(handler: extern "C" fn()) -> *mut c_void;
    fn __cxa_current_exception_type() -> *const c_void;
    #[link_name = "_ZTISt9bad_alloc"]
    static BAD_ALLOC: u8;
}

/// From here on, an end for want of memory is told as an error. What ends for another reason ends as before.
pub fn watch() {
    // SAFETY: the handlers write to a file descriptor, end the process or abort, and nothing else.
    unsafe {
        BEFORE.store(set_terminate(terminate), Ordering::Relaxed);
        libc::signal(libc::SIGABRT, abort as *const () as libc::sighandler_t);
    }
}

/// An exception of C++ that nobody catches, such as one of a thread of libtorch's.
extern "C" fn terminate() {
    // SAFETY: asks for the type of the exception that is being handled; types are told apart by their place.
    if unsafe { __cxa_current_exception_type() == (&raw const BAD_ALLOC).cast() } {
        end();
    }
    let before = BEFORE.load(Ordering::Relaxed);
    if !before.is_null() {
        // SAFETY: it is the function that `set_terminate` gave back.
        unsafe { std::mem::transmute::<*mut c_void, extern "C" fn()>(before)() };
    }
    std::process::abort();
}

/// Rust's answer to a refusal, after it has told how many bytes it asked for.
extern "C" fn abort(_: c_int) {
    if REFUSED.load(Ordering::Relaxed) {
        end();
    }
}

/// Ends without another allocation.
fn end() {
    for part in ["error: ", OUT_OF_MEMORY.0, "\nhint: ", OUT_OF_MEMORY.1, "\n"] {
        // SAFETY: writes bytes of a text that lives for ever.
        unsafe { libc::write(libc::STDERR_FILENO, part.as_ptr().cast(), part.len()) };
    }
    // SAFETY: ends the process; files are written whole or not at all, whatever ends it.
    unsafe { libc::_exit(c_int::from(crate::ERROR)) };
}
