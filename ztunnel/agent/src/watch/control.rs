//! The stream to control: what the node has goes up, how it shall be comes down.
//!
//! Invariant: the agent works on with the last orders while the stream is down; a new stream begins with
//! everything the node has, so control never relies on what an earlier stream carried.

use crate::events::Event;
use culvert_io::control::{Backoff, Control};
use culvert_proto::node::{NodeReport, node_service_client::NodeServiceClient};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Reports that wait for a slow stream; when they are that many, the stream is taken for dead.
const REPORTS: usize = 1024;

/// A stream that lived this long was a good one: the next is tried at once.
const GOOD: Duration = Duration::from_secs(30);

/// Keeps a stream open, for as long as anybody listens to its events.
pub async fn attend(control: Control, events: mpsc::Sender<Event>) {
    let mut backoff = Backoff::default();
    while !events.is_closed() {
        let began = Instant::now();
        let ended = stream(&control, &events).await;
        if began.elapsed() >= GOOD {
            backoff.reset();
        }
        let wait = backoff.pause();
        tracing::warn!(reason = %ended, ?wait, "the stream to control is down");
        if events.send(Event::ControlLost).await.is_err() {
            return;
        }
        tokio::time::sleep(wait).await;
    }
}

/// Runs one stream and says how it ended.
async fn stream(control: &Control, events: &mpsc::Sender<Event>) -> String {
    let channel = match control.channel() {
        Ok(channel) => channel,
        Err(error) => return error.to_string(),
    };
    let mut client = NodeServiceClient::with_interceptor(channel, control.credentials());
    let (reports, outgoing) = mpsc::channel::<NodeReport>(REPORTS);
    // The hello has to lie ready before the call: control answers only once it has seen it.
    if events.send(Event::ControlFound(reports)).await.is_err() {
        return "the agent is stopping".to_owned();
    }
    let mut orders = match client.attend(ReceiverStream::new(outgoing)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return described(&status),
    };
    loop {
        match orders.message().await {
            Ok(Some(order)) => {
                if events.send(Event::Order(order)).await.is_err() {
                    return "the agent is stopping".to_owned();
                }
            }
            Ok(None) => return "control ended it".to_owned(),
            Err(status) => return described(&status),
        }
    }
}

/// A status with its causes, which tonic keeps out of the message; none twice.
fn described(status: &tonic::Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}
