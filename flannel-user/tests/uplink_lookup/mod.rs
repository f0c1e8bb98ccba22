//! The choice of an uplink in the network namespace of the calling thread.

use flannel_user::uplink::{Uplink, UplinkChoice, UplinkError, choose};

/// What the agent would take.
pub(crate) async fn chosen(choice: UplinkChoice) -> Result<Uplink, UplinkError> {
    let (connection, handle, _) = rtnetlink::new_connection().expect("a connection");
    let connection = tokio::spawn(connection);
    let result = choose(&handle, &choice).await;
    connection.abort();
    result
}
