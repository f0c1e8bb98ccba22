//! What the thread is told, and how it waits for that.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd},
    sync::{
        Arc,
        mpsc::{self, Receiver, Sender, TryRecvError},
    },
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use super::Opening;

/// What the thread is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Command {
    /// Rules or ways have changed: live ones go to conntrack at once.
    HandOver,
    /// Which connections may open.
    Allow(Opening),
    /// Everything goes to conntrack, and the thread ends.
    End,
}

/// Tells the thread.
#[derive(Debug, Clone)]
pub(in super::super) struct Commands {
    queue: Sender<Command>,
    bell: Arc<EventFd>,
}

/// The thread's end.
#[derive(Debug)]
pub(super) struct Received {
    queue: Receiver<Command>,
    bell: Arc<EventFd>,
}

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard {
    Command(Command),
    /// The other descriptor can be read.
    News,
    /// The time was over.
    Nothing,
}

/// Both ends.
///
/// # Errors
/// No descriptor is left.
pub(super) fn commands() -> io::Result<(Commands, Received)> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    let bell = Arc::new(EventFd::from_flags(flags)?);
    let (sender, queue) = mpsc::channel();
    let commands = Commands {
        queue: sender,
        bell: Arc::clone(&bell),
    };
    Ok((commands, Received { queue, bell }))
}

impl Commands {
    /// Tells it, if it is still there.
    pub(in super::super) fn send(&self, command: Command) {
        if self.queue.send(command).is_ok() {
            // Fails only where it has been rung 2^64 times.
            let _ = self.bell.write(1);
        }
    }
}

impl Received {
    /// Waits for a command or until `news` can be read, at most `limit`. Without anybody left who
    /// might tell anything, the end.
    pub(super) fn wait(&self, limit: Duration, news: Option<BorrowedFd<'_>>) -> Heard {
        if let Some(command) = self.next() {
            return Heard::Command(command);
        }
        let mut both = vec![PollFd::new(self.bell.as_fd(), PollFlags::POLLIN)];
        both.extend(news.map(|news| PollFd::new(news, PollFlags::POLLIN)));
        // Whole milliseconds, and never sooner than asked for.
        let limit = PollTimeout::try_from(limit + Duration::from_micros(999));
        // A signal is as good as the end of the time.
        let _ = poll(&mut both, limit.unwrap_or(PollTimeout::MAX));
        let mut ready = both.iter().map(|one| one.any() == Some(true));
        let (is_told, has_news) = (ready.next() == Some(true), ready.next() == Some(true));
        if is_told {
            let _ = self.bell.read();
        }
        match self.next() {
            Some(command) => Heard::Command(command),
            None if has_news => Heard::News,
            None => Heard::Nothing,
        }
    }

    fn next(&self) -> Option<Command> {
        match self.queue.try_recv() {
            Ok(command) => Some(command),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Command::End),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Instant};

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn commands_come_in_order_and_none_is_lost() {
        let (sender, received) = commands().expect("descriptors");
        sender.send(Command::HandOver);
        sender.send(Command::Allow(Opening::Direct));
        assert_eq!(received.wait(LONG, None), Heard::Command(Command::HandOver));
        let allowed = Heard::Command(Command::Allow(Opening::Direct));
        assert_eq!(received.wait(LONG, None), allowed);
        // Their bell may ring once more.
        let short = Duration::from_millis(2);
        assert_eq!(received.wait(short, None), Heard::Nothing);
        let before = Instant::now();
        assert_eq!(received.wait(short, None), Heard::Nothing);
        assert!(before.elapsed() >= short);
        drop(sender);
        assert_eq!(received.wait(LONG, None), Heard::Command(Command::End));
    }

    #[test]
    fn one_who_waits_is_woken() {
        let (sender, received) = commands().expect("descriptors");
        let begun = Instant::now();
        let waiting = thread::spawn(move || received.wait(LONG, None));
        thread::sleep(Duration::from_millis(20));
        sender.send(Command::HandOver);
        let heard = waiting.join().expect("no panic");
        assert_eq!(heard, Heard::Command(Command::HandOver));
        assert!(begun.elapsed() < LONG / 2);
    }

    #[test]
    fn news_end_a_wait_but_commands_go_first() {
        let (sender, received) = commands().expect("descriptors");
        let news = EventFd::from_value(1).expect("a descriptor");
        assert_eq!(received.wait(LONG, Some(news.as_fd())), Heard::News);
        sender.send(Command::End);
        let heard = received.wait(LONG, Some(news.as_fd()));
        assert_eq!(heard, Heard::Command(Command::End));
    }
}
