//! Why there are no flags to work with, and how the process ends then.

use super::MAX_RENEW_MARGIN;

/// Why there are no flags to work with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FlagsError {
    /// `--help`; holds the text to print.
    #[error("{0}")]
    Help(String),
    /// `--version`; holds the line to print.
    #[error("{0}")]
    Version(String),
    /// A flag on the command line is unknown or its value unreadable; complete text.
    #[error("{0}")]
    Usage(String),
    /// An argument that belongs to no flag.
    #[error(
        "unexpected argument {0:?}: a switch takes its value as in --ip-masq=true, and there is nothing but flags"
    )]
    Argument(String),
    /// A variable's value is unreadable.
    #[error("cannot use the variable {variable}={value:?}: {cause}")]
    Variable {
        /// The variable's name.
        variable: String,
        /// Its value.
        value: String,
        /// What is wrong with it.
        cause: String,
    },
    /// `--subnet-lease-renew-margin` is outside 1..=1439.
    #[error(
        "--subnet-lease-renew-margin is {0} minutes, but must be 1 to {MAX_RENEW_MARGIN}, less than a day"
    )]
    RenewMargin(u64),
    /// Leases cannot come from two places.
    #[error(
        "{lease_dir} and {etcd} are both given, but leases come from a directory or from etcd: remove one of them"
    )]
    TwoLeaseSources {
        /// The directory's flag or variable.
        lease_dir: String,
        /// The flag or variable that says etcd.
        etcd: String,
    },
    /// Part of flannel, but not of this version.
    #[error("{flag} is given, but {what} not available in this version; {advice}")]
    NotAvailable {
        /// The flag or variable as the user gave it.
        flag: String,
        /// What it asks for, with its verb.
        what: &'static str,
        /// What to do instead.
        advice: &'static str,
    },
}

impl FlagsError {
    /// Exit status: 0 for help and version, 2 for what cannot be read, 1 for what is
    /// readable but refused.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Help(_) | Self::Version(_) => 0,
            Self::Usage(_) | Self::Argument(_) | Self::Variable { .. } => 2,
            Self::RenewMargin(_) | Self::TwoLeaseSources { .. } | Self::NotAvailable { .. } => 1,
        }
    }
}
