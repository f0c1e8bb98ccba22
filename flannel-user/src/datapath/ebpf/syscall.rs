//! Commands of `bpf(2)` that the library has no call for.

use std::io;

/// Runs one command; `attributes` is its part of `union bpf_attr`, which the kernel may write to.
///
/// # Errors
/// What the kernel says.
///
/// # Safety
/// `attributes` is laid out as the kernel expects it for that command, and what it points to is of
/// the sizes that the command reads and writes.
pub(super) unsafe fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<()> {
    // SAFETY: as the caller promises; the attributes live until the kernel returns.
    let answer =
        unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size_of::<T>()) };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
