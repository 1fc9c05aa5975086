//! How libtorch's threads wait for work: they spin shortly, then sleep, unless the user's environment says otherwise.
//!
//! libgomp's threads spin by default, and where other programs want the cores too, a thread that spins keeps them from the one
//! that it waits for; where they do not, a thread that sleeps at once comes back late (BENCHMARKS.md, "Beside a busy process").
//! libgomp reads `GOMP_SPINCOUNT` once, in its initialiser, which
//! runs before `main` because the program is linked to it. So the program starts itself anew with the variable set, before any
//! library's initialiser has run: it stays the same process, with its files, folder and signals as they were.

use std::ffi::{CStr, c_char, c_int};
use std::ptr;

/// What the new environment says.
///
/// libgomp's own is 300,000 turns; 10,000 cost nothing that can be measured on a quiet machine.
const SHORT_SPIN: &CStr = c"GOMP_SPINCOUNT=10000";
/// Where one of these is set the user has decided; the KMP ones are of LLVM's and Intel's OpenMP, which a libtorch of the
/// user's may have.
const DECIDED: [&[u8]; 4] = [b"OMP_WAIT_POLICY=", b"GOMP_SPINCOUNT=", b"KMP_BLOCKTIME=", b"KMP_LIBRARY="];

/// The only functions that run before the initialisers of shared libraries (ELF gABI, "Initialization and Termination
/// Functions"); glibc gives them what `main` gets.
#[used]
#[unsafe(link_section = ".preinit_array")]
static BEFORE_LIBRARIES: unsafe extern "C" fn(c_int, *const *const c_char, *const *const c_char) =
    spin_shortly;

/// Starts the program anew with [`SHORT_SPIN`]; comes back where the user has decided, or where that cannot be done.
///
/// Neither the standard library nor libc's `environ` is ready here: nothing but the arguments is used.
///
/// # Safety
/// `argv` and `envp` are null-terminated arrays of C strings.
unsafe extern "C" fn spin_shortly(_: c_int, argv: *const *const c_char, envp: *const *const c_char) {
    let mut environment = Vec::new();
    // SAFETY: every entry before the null is a C string.
    unsafe {
        let mut at = envp;
        while !(*at).is_null() {
            let entry = CStr::from_ptr(*at).to_bytes();
            if DECIDED.iter().any(|name| entry.starts_with(name)) {
                return;
            }
            environment.push(*at);
            at = at.add(1);
        }
    }
    environment.extend([SHORT_SPIN.as_ptr(), ptr::null()]);
    // SAFETY: the kernel's own values; AT_EXECFN is the path that this process was started from, or null.
    unsafe {
        // Without a base the loader itself was started with this program as its argument, and perhaps other flags.
        let by_the_loader = libc::getauxval(libc::AT_BASE) == 0;
        let program = libc::getauxval(libc::AT_EXECFN) as *const c_char;
        if !by_the_loader && !program.is_null() {
            libc::execve(program, argv, environment.as_ptr());
        }
    }
}
