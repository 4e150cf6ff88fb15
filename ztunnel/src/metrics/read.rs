//! What is read when the page is asked for: states of other parts, and what is known of the process.

use crate::{context::Context, pods::Pod};
use culvert_io::{
    metrics::{Page, process},
    xds::Termination,
};
use culvert_proto::agent::{AgentStats, PodCaptureState};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

culvert_io::read_metrics! { pub(super) DECLARED = {
    /// Streams to control that ended, by how.
    XDS_ENDED: "counter" = "istio_xds_connection_terminations_total" ["reason"],
    /// Responses of control.
    XDS_MESSAGES: "counter" = "istio_xds_message_total" ["url"],
    /// Bytes of the resources in control's responses.
    XDS_BYTES: "counter" = "istio_xds_message_bytes_total" ["url"],
    /// Responses of control of which something was refused.
    XDS_REFUSED: "counter" = "culvert_xds_refused_total" ["url"],
    /// Whether the stream to control is up.
    CONTROL_CONNECTED: "gauge" = "culvert_control_connected" [],
    /// How long control has not confirmed what is in use: 0 while the stream to it is up.
    CONFIG_AGE: "gauge" = "culvert_config_age_seconds" [],
    /// When an identity's SVID ends, in seconds since 1970; 0 without an SVID.
    SVID_EXPIRY: "gauge" = "culvert_svid_expiry_timestamp_seconds" ["identity"],
    /// When the first of the SVIDs ends, in seconds since 1970; 0 while an identity has none.
    SVID_FIRST_EXPIRY: "gauge" = "culvert_svid_first_expiry_timestamp_seconds" [],
    /// Requests to the CA: `issued` or `failed`.
    SVID_REQUESTS: "counter" = "culvert_svid_requests_total" ["outcome"],
    /// What a pod uses of its quotas: open `connections`, dials `pending`, peers'
    /// `handshakes` in flight and `tunnels`, and `buffered_bytes` that wait for slow readers.
    QUOTA_USED: "gauge" = "culvert_quota_used" ["namespace", "pod", "quota"],
    /// The quotas of each pod.
    QUOTA: "gauge" = "culvert_quota" ["quota"],
    /// How much would be lost with this process: `ports` it serves, `peers` (identities) with a tunnel, `identities` it holds, `tenants` (namespaces) it serves.
    EXPOSURE: "gauge" = "culvert_exposure" ["of"],
    /// Log lines dropped because nobody took them in time.
    LOG_DROPPED: "counter" = "culvert_log_lines_dropped_total" [],
    /// How long ago the agent last reported; the metrics below are from then.
    AGENT_AGE: "gauge" = "culvert_agent_report_age_seconds" [],
    /// Pods the agent knows: `captured`, `broken`, `draining`, or `not_captured`.
    AGENT_PODS: "gauge" = "culvert_agent_pods" ["state"],
    /// Times the agent put capture in place again.
    AGENT_REPAIRS: "counter" = "culvert_agent_repairs_total" [],
    /// Times the agent looked at all of its pods.
    AGENT_LOOKS: "counter" = "culvert_agent_verifications_total" [],
    /// Packets that the host's guards dropped.
    AGENT_DROPPED: "counter" = "culvert_agent_guard_dropped_packets_total" [],
    /// Processor time of the agent.
    AGENT_CPU: "counter" = "culvert_agent_cpu_seconds_total" [],
} }

/// Identities and pods with series of their own; a node has fewer.
const MOST: usize = 500;

/// The page that Prometheus scrapes.
pub fn page(context: &Context) -> Vec<u8> {
    let pods = context.pods.all();
    for connection in pods.iter().flat_map(|pod| pod.connections.all()) {
        connection.tell();
    }
    let mut page = Page::default();
    context.metrics.show(&mut page);
    process::show(&mut page, "ztunnel");
    discovery(&mut page, context);
    svids(&mut page, context);
    quotas(&mut page, context, &pods);
    exposure(&mut page, context, &pods);
    page.one(&LOG_DROPPED, context.log.dropped() as f64);
    if let Some((age, stats)) = context.agent.last() {
        agent(&mut page, age, &stats);
    }
    page.into_bytes()
}

fn discovery(page: &mut Page, context: &Context) {
    let stats = context.discovery.stats();
    let mut ended = page.family(&XDS_ENDED);
    for how in Termination::ALL {
        ended.sample(&[how.word()], stats.ended(how) as f64);
    }
    let carried: Vec<_> = stats.carried().collect();
    let mut family = page.family(&XDS_MESSAGES);
    carried
        .iter()
        .for_each(|of| family.sample(&[of.url], of.messages as f64));
    let mut family = page.family(&XDS_BYTES);
    carried
        .iter()
        .for_each(|of| family.sample(&[of.url], of.bytes as f64));
    let mut family = page.family(&XDS_REFUSED);
    carried
        .iter()
        .for_each(|of| family.sample(&[of.url], of.refused as f64));
    page.one(&CONTROL_CONNECTED, f64::from(u8::from(stats.is_up())));
    // What was read from disk at the start is older than this process.
    let age = context.discovery.config_age().unwrap_or_else(|| stats.age());
    page.one(&CONFIG_AGE, age.as_secs_f64());
}

fn svids(page: &mut Page, context: &Context) {
    let seconds = |time: SystemTime| {
        time.duration_since(UNIX_EPOCH)
            .map_or(0.0, |since| since.as_secs_f64())
    };
    let mut held: Vec<_> = context
        .identities
        .all()
        .into_iter()
        .map(|(id, held)| (id, held.map_or(0.0, |held| seconds(held.svid.not_after()))))
        .collect();
    held.sort_by(|a, b| a.1.total_cmp(&b.1).then_with(|| a.0.cmp(&b.0)));
    if let Some((_, first)) = held.first() {
        page.one(&SVID_FIRST_EXPIRY, *first);
    }
    // Those that end first, if there are too many.
    let mut family = page.family(&SVID_EXPIRY);
    for (id, expiry) in held.iter().take(MOST) {
        family.sample(&[id.as_str()], *expiry);
    }
    let (issued, failed) = context.identities.requests();
    let mut family = page.family(&SVID_REQUESTS);
    family.sample(&["issued"], issued as f64);
    family.sample(&["failed"], failed as f64);
}

fn quotas(page: &mut Page, context: &Context, pods: &[Arc<Pod>]) {
    let limits = context.limits;
    let mut family = page.family(&QUOTA);
    family.sample(&["connections"], limits.connections as f64);
    family.sample(&["pending"], limits.pending as f64);
    family.sample(&["handshakes"], limits.pending as f64);
    family.sample(&["tunnels"], limits.tunnels as f64);
    let mut family = page.family(&QUOTA_USED);
    for pod in pods.iter().take(MOST) {
        let pending = limits.pending.saturating_sub(pod.pending.available_permits());
        let mut show = |quota, used: usize| family.sample(&[&pod.namespace, &pod.name, quota], used as f64);
        show("connections", pod.connections.held());
        show("pending", pending);
        show("handshakes", pod.handshakes.held());
        show("tunnels", pod.accepted.held());
        show("buffered_bytes", pod.budget.used());
    }
}

fn exposure(page: &mut Page, context: &Context, pods: &[Arc<Pod>]) {
    /// Admin, metrics, readiness.
    const PAGES: usize = 3;
    let ports: usize = PAGES + pods.iter().map(|pod| pod.listeners).sum::<usize>();
    let peers: BTreeSet<_> = pods.iter().flat_map(|pod| pod.live.peers()).collect();
    let tenants: BTreeSet<&str> = pods.iter().map(|pod| &*pod.namespace).collect();
    let mut family = page.family(&EXPOSURE);
    family.sample(&["ports"], ports as f64);
    family.sample(&["peers"], peers.len() as f64);
    family.sample(&["identities"], context.identities.all().len() as f64);
    family.sample(&["tenants"], tenants.len() as f64);
}

fn agent(page: &mut Page, age: Duration, stats: &AgentStats) {
    page.one(&AGENT_AGE, age.as_secs_f64());
    let mut states: BTreeMap<&str, usize> = BTreeMap::new();
    for word in [
        PodCaptureState::NotCaptured,
        PodCaptureState::Captured,
        PodCaptureState::Draining,
        PodCaptureState::Broken,
    ]
    .map(word)
    {
        states.insert(word, 0);
    }
    for pod in &stats.pods {
        *states.entry(word(pod.state())).or_default() += 1;
    }
    let mut family = page.family(&AGENT_PODS);
    for (state, count) in states {
        family.sample(&[state], count as f64);
    }
    page.one(&AGENT_REPAIRS, stats.repairs_total as f64);
    page.one(&AGENT_LOOKS, stats.verifications_total as f64);
    page.one(&AGENT_DROPPED, stats.guard_dropped_total as f64);
    page.one(&AGENT_CPU, stats.cpu_seconds);
}

fn word(state: PodCaptureState) -> &'static str {
    match state {
        PodCaptureState::NotCaptured => "not_captured",
        PodCaptureState::Captured => "captured",
        PodCaptureState::Draining => "draining",
        PodCaptureState::Broken => "broken",
    }
}
