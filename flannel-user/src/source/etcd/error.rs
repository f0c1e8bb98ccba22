//! What goes wrong between this agent and etcd, told apart by what to do about it.

use std::{error::Error as _, path::Path};

use super::options::OptionsError;
use crate::error_chain::in_one_line;

/// A call to etcd failed.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// None of the endpoints could be used; what each said.
    #[error("no etcd endpoint can be used: {0}")]
    NoEndpoint(String),
    /// The endpoint did not answer in time.
    #[error("etcd at {endpoint} does not answer (waited {seconds} s)")]
    NoAnswer {
        /// Its URL without secrets.
        endpoint: String,
        /// How long it was given.
        seconds: u64,
    },
    /// While the endpoint kept silent another connection was answered.
    #[error("etcd at {0} keeps silent while others answer")]
    Overtaken(String),
    /// The endpoint cannot be reached, or cannot serve: no leader, shutting down.
    #[error("etcd at {endpoint}: {message}")]
    Unavailable {
        /// Its URL without secrets.
        endpoint: String,
        /// What it, or the connection to it, said.
        message: String,
    },
    /// The cluster understood and said no.
    #[error("etcd at {endpoint} refuses: {message}{}", advice(message))]
    Refused {
        /// Its URL without secrets.
        endpoint: String,
        /// What it said.
        message: String,
    },
    /// The history asked for is gone.
    #[error("etcd has compacted the revision asked for")]
    Compacted,
    /// The options are not usable (any more).
    #[error(transparent)]
    Options(#[from] OptionsError),
}

/// gRPC's status codes that say: the request was understood, and this is the answer.
const ANSWERS: [i32; 7] = [
    3,  // invalid argument: bad credentials, no user given
    5,  // not found
    6,  // already exists
    7,  // permission denied
    9,  // failed precondition: authentication is not enabled
    11, // out of range: compacted
    16, // unauthenticated: the token ran out
];
const PERMISSION_DENIED: i32 = 7;
const OUT_OF_RANGE: i32 = 11;
const UNAUTHENTICATED: i32 = 16;

impl EtcdError {
    pub(super) fn new(endpoint: &str, error: &etcd_client::Error) -> Self {
        let endpoint = endpoint.to_owned();
        let etcd_client::Error::GRpcStatus(status) = error else {
            let message = match error {
                etcd_client::Error::TransportError(error) => in_one_line(error),
                other => other.to_string(),
            };
            return Self::Unavailable { endpoint, message };
        };
        let message = match status.source() {
            Some(source) => in_one_line(source),
            None => status.message().to_owned(),
        };
        match i32::from(status.code()) {
            OUT_OF_RANGE if message.contains("compacted") => Self::Compacted,
            // The next connection brings a new token.
            UNAUTHENTICATED => Self::Unavailable { endpoint, message },
            code if ANSWERS.contains(&code) => Self::Refused { endpoint, message },
            _ => Self::Unavailable { endpoint, message },
        }
    }

    /// Adds the likeliest cause where the server broke a TLS connection off. By the
    /// time it checks the client's certificate the client already sends (TLS 1.3), so its
    /// alert is often lost in the end of the connection.
    pub(super) fn suspecting(self, certificate: &Path) -> Self {
        match self {
            Self::Unavailable { endpoint, message }
                if ["fatal alert", "closed", "reset", "broken pipe"]
                    .iter()
                    .any(|sign| message.to_ascii_lowercase().contains(sign)) =>
            {
                Self::Unavailable {
                    endpoint,
                    message: format!(
                        "{message} (has it refused the certificate {}? it may have run out)",
                        certificate.display()
                    ),
                }
            }
            other => other,
        }
    }

    /// True when another endpoint, or a new connection, may do better.
    pub(super) fn is_of_the_endpoint(&self) -> bool {
        matches!(
            self,
            Self::NoAnswer { .. } | Self::Overtaken(_) | Self::Unavailable { .. }
        )
    }
}

/// True for "authentication is not enabled": then no user is needed.
pub(super) fn needs_no_user(error: &etcd_client::Error) -> bool {
    matches!(error, etcd_client::Error::GRpcStatus(status)
        if status.message().contains("authentication is not enabled"))
}

/// True when the endpoint works and this user may not read that key.
pub(super) fn is_permission(error: &etcd_client::Error) -> bool {
    matches!(error, etcd_client::Error::GRpcStatus(status)
        if i32::from(status.code()) == PERMISSION_DENIED)
}

fn advice(message: &str) -> &'static str {
    if message.contains("user name is empty") {
        "; give --etcd-username and --etcd-password"
    } else if message.contains("authentication failed") {
        "; check --etcd-username and --etcd-password"
    } else if message.contains("permission denied") {
        "; the user of --etcd-username needs to read and write everything below --etcd-prefix"
    } else {
        ""
    }
}
