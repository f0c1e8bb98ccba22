//! The hooks.

#![expect(
    clippy::needless_pass_by_value,
    reason = "a hook takes its context by value"
)]

mod apply;
mod counters;
mod maps;
mod slowed;
mod trace;
mod wire;

use aya_ebpf::{macros::classifier, programs::TcContext};
use flannel_ebpf::{
    decap, encap,
    frame::Frame as _,
    reason::{Action, Reason},
};

use self::{maps::KernelTables, wire::Wire};

/// `TC_ACT_UNSPEC`: the next program or filter of the hook decides, the stack at last.
const NEXT: i32 = -1;
/// `TC_ACT_SHOT`: freed.
const DROP: i32 = 2;

/// Ingress of a pod's host-side veth.
#[classifier]
pub(crate) fn from_pod(context: TcContext) -> i32 {
    let wire = Wire::new(&context);
    let len = wire.meta().len;
    let outcome = encap::encapsulate(&wire, &KernelTables).map(|way| apply::send(&context, &way));
    finish(&context, outcome, len)
}

/// Ingress of the uplink.
#[classifier]
pub(crate) fn from_uplink(context: TcContext) -> i32 {
    let wire = Wire::new(&context);
    let len = wire.meta().len;
    let outcome = decap::deliver(&wire, &KernelTables).map(|way| apply::deliver(&context, &way));
    finish(&context, outcome, len)
}

/// Counts the outcome once and turns it into the hook's answer.
#[inline(always)]
fn finish(context: &TcContext, outcome: Result<(Reason, i32), Reason>, len: u32) -> i32 {
    slowed::delay();
    let (reason, redirect) = match outcome {
        Ok((reason, verdict)) => (reason, verdict),
        Err(reason) => (reason, NEXT),
    };
    counters::count(reason, len);
    match reason.action() {
        Action::Forwarded => redirect,
        Action::Kernel => {
            trace::left_to_kernel(context, reason);
            NEXT
        }
        Action::Dropped => DROP,
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The helpers used are GPL-only.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
pub(crate) static LICENSE: [u8; 4] = *b"GPL\0";
