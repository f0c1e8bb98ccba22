//! Starts every child process of a lab from one thread that never ends.
//!
//! A child asks the kernel to be killed with its parent (`PR_SET_PDEATHSIG`),
//! and to the kernel the parent is the *thread* that forked it. A test runner
//! ends a thread per test, so the forks happen here instead.

use std::{
    io,
    os::unix::process::CommandExt,
    process::{Child, Command},
    sync::{
        LazyLock, Mutex,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

struct Order {
    command: Command,
    answer: Sender<io::Result<Child>>,
}

static ORDERS: LazyLock<Mutex<Sender<Order>>> = LazyLock::new(|| {
    let (sender, receiver) = channel();
    thread::Builder::new()
        .name("lab-spawner".into())
        .spawn(move || serve(&receiver))
        .expect("a thread can be started");
    Mutex::new(sender)
});

fn serve(orders: &Receiver<Order>) {
    for Order {
        mut command,
        answer,
    } in orders
    {
        // The receiver is gone only if the asking thread panicked; the child dies with us.
        let _ = answer.send(command.spawn());
    }
}

/// Starts `command` so that it cannot outlive this process, however that ends.
///
/// The child gets its own process group: Ctrl-C reaches only the lab, which
/// then takes everything down in order.
///
/// # Errors
/// As [`Command::spawn`].
pub fn spawn(mut command: Command) -> io::Result<Child> {
    let parent = nix::unistd::getpid();
    command.process_group(0);
    // SAFETY: between fork and exec only prctl and getppid are called, which are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            // The parent may have died before the request was made.
            if nix::unistd::getppid() == parent {
                Ok(())
            } else {
                Err(io::Error::other("the lab has gone"))
            }
        });
    }
    let (answer, answered) = channel();
    ORDERS
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .send(Order { command, answer })
        .map_err(|_| io::Error::other("the spawner thread has gone"))?;
    answered
        .recv()
        .map_err(|_| io::Error::other("the spawner thread has gone"))?
}
