//! The owner of all pods: every event passes through here, one after the other.
//!
//! ```text
//! CNI ──ADD, DEL──▶ ┌──────┐ ──pods, drain, declared──▶ ztunnel instances
//! control ─orders─▶ │ pods │ ──states──▶ control
//! ztunnel ─wishes─▶ └──────┘ ◀── the clock: look, repair, end drains
//! ```
//! Invariant: a pod follows control's last word, whether control is there or not; a pod that control has
//! never spoken of starts only if its namespace is known to take no part in the mesh.

mod instances;
mod pod;

use crate::{
    events::{Add, Event, Outgoing, Verdict},
    guard::Host,
    listeners,
    marks::Marks,
    netns::{Netns, Places},
    orders::{PodOrder, Settings, address, port},
    records::{Apart, Record, Records, is_uid},
    serve::Sources,
};
use culvert_proto::{
    agent::{self, from_agent, from_ztunnel},
    node::{self, NodeReport, node_order, node_report},
};
use instances::Instances;
use nlink::{Connection, Route};
use pod::{NodeView, Pod, State};
use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    os::fd::OwnedFd,
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot};

/// How often every pod is looked at; a change is found and repaired within two seconds (F07).
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Looks after a start until listeners that nobody gave back are made anew.
const LOOKS_FOR_RETURN: u64 = 4;

/// Looks between two reports of counters, and between two readings of the node's addresses.
const LOOKS_PER_REPORT: u64 = 10;
const LOOKS_PER_ADDRESSES: u64 = 20;

/// What the owner is started with.
#[derive(Debug)]
pub struct Config {
    pub places: Places,
    pub drain: Duration,
}

pub struct Pods {
    config: Config,
    records: Records,
    node: NodeView,
    apart: Apart,
    pods: BTreeMap<String, Pod>,
    waiting: BTreeMap<String, Vec<oneshot::Sender<Verdict>>>,
    instances: Instances,
    control: Option<mpsc::Sender<NodeReport>>,
    sources: Sources,
    looks: u64,
    repairs: u64,
}

impl Pods {
    /// Takes up what an earlier agent has left.
    pub async fn open(config: Config, records: Records, sources: Sources) -> io::Result<Self> {
        let mut pods = Self {
            node: NodeView {
                host: Host::new().map_err(io::Error::other)?,
                settings: records.settings(),
                addresses: node_addresses().await,
            },
            apart: records.apart(),
            pods: BTreeMap::new(),
            waiting: BTreeMap::new(),
            instances: Instances::default(),
            control: None,
            sources,
            looks: 0,
            repairs: 0,
            config,
            records,
        };
        for record in pods.records.pods()? {
            let mut pod = Pod::new(record);
            pod.returning = true;
            pod.ran_outside = pod.record.order.as_ref().is_none_or(|order| !order.enrolled);
            match pods.config.places.find(&pod.record) {
                Some(netns) => pod.settle_in(netns)?,
                None => {
                    tracing::warn!(
                        pod = pod.record.uid,
                        "its namespace is not where it was; waiting for ztunnel"
                    );
                }
            }
            pods.pods.insert(pod.record.uid.clone(), pod);
        }
        Ok(pods)
    }

    pub async fn run(mut self, mut events: mpsc::Receiver<Event>) {
        let mut clock = tokio::time::interval(LOOK_EVERY);
        clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                event = events.recv() => match event {
                    Some(event) => self.handle(event).await,
                    None => return,
                },
                _ = clock.tick() => self.look().await,
            }
        }
    }

    async fn handle(&mut self, event: Event) {
        match event {
            Event::Add { netns, add, reply } => self.add(netns, add, reply).await,
            Event::Del { uid, reply } => {
                self.forget(&uid).await;
                let _ = reply.send(Ok(()));
            }
            Event::ControlFound(reports) => self.greet(reports),
            Event::ControlLost => self.control = None,
            Event::Order(order) => self.order(order).await,
            Event::Joined { instance, outgoing } => self.joined(instance, outgoing),
            Event::Said {
                instance,
                message,
                fds,
            } => self.said(instance, message, fds).await,
            Event::Left { instance } => self.instances.leave(instance),
        }
    }

    async fn add(&mut self, netns: OwnedFd, add: Add, reply: oneshot::Sender<Verdict>) {
        let netns = Netns::new(netns);
        let uid = add.uid.clone();
        let before = self.pods.remove(&uid);
        let record = match &before {
            Some(pod) => Record {
                addresses: add.addresses,
                host_ifindex: add.host_ifindex,
                netns_path: add.netns_path,
                ..pod.record.clone()
            },
            None => Record {
                uid: add.uid,
                namespace: add.namespace,
                name: add.name,
                addresses: add.addresses,
                host_ifindex: add.host_ifindex,
                netns_path: add.netns_path,
                netns: (0, 0),
                marks: Marks::random(),
                order: None,
            },
        };
        let mut pod = before.unwrap_or_else(|| Pod::new(record.clone()));
        pod.record = record;
        pod.returning = false;
        if let Err(error) = pod.settle_in(netns.clone()) {
            let _ = reply.send(Err(format!("the pod's namespace: {error}")));
            return;
        }
        self.config.places.keep(&pod.record, &netns);
        if let Err(error) = self.records.keep(&pod.record) {
            let _ = reply.send(Err(format!("the pod's record: {error}")));
            return;
        }
        self.report(node_report::Report::Seen(seen(&pod.record)));
        self.pods.insert(uid.clone(), pod);
        self.waiting.entry(uid.clone()).or_default().push(reply);
        self.settle(&uid).await;
    }

    /// Brings a pod to control's last word, tells everybody, and lets it start if it may.
    async fn settle(&mut self, uid: &str) {
        let Some(pod) = self.pods.get_mut(uid) else {
            return;
        };
        if pod.returning {
            return;
        }
        let before = pod.state.clone();
        let order = pod.record.order.clone();
        let outcome = match &order {
            None => {
                if self.control.is_none() && self.apart.contains(&pod.record.namespace) {
                    pod.ran_outside = true;
                    self.answer(uid, Ok(()));
                }
                return;
            }
            Some(order) if order.enrolled => pod.enrol(order, &self.node).await,
            Some(_) => match pod.state {
                State::Idle => pod.stay_out(self.config.drain).await,
                State::Draining { .. } => Ok(()),
                State::Captured | State::Broken(_) => pod.begin_drain(self.config.drain).await,
            },
        };
        if let Err(error) = &outcome {
            pod.state = State::Broken(error.to_string());
        }
        let (state, source) = (pod.state.clone(), (pod.netns.clone(), pod.record.marks.socket));
        if state != before {
            tracing::info!(pod = uid, ?state, "capture");
        }
        match (&state, &order, source) {
            (State::Captured, Some(order), (Some(netns), mark)) => {
                self.sources.add(uid, netns, mark);
                self.announce(uid, order);
            }
            (State::Idle, ..) => self.sources.remove(uid),
            _ => {}
        }
        self.report_state(uid);
        self.answer(uid, outcome.map_err(|error| error.to_string()));
    }

    fn answer(&mut self, uid: &str, verdict: Verdict) {
        for reply in self.waiting.remove(uid).unwrap_or_default() {
            let _ = reply.send(verdict.clone());
        }
    }

    fn announce(&mut self, uid: &str, order: &PodOrder) {
        let Some(pod) = self.pods.get(uid) else {
            return;
        };
        self.instances.tell_all(Outgoing {
            message: from_agent::Message::AddPod(pod.announcement(order)),
            fds: pod.listener_fds(),
        });
    }

    /// Ends everything of a pod whose namespace is going away.
    async fn forget(&mut self, uid: &str) {
        let Some(pod) = self.pods.remove(uid) else {
            return;
        };
        self.sources.remove(uid);
        self.instances.tell_all(gone(uid));
        self.answer(uid, Err("the pod was deleted".to_owned()));
        self.config.places.leave(&pod.record);
        pod.gone().await;
        if let Err(error) = self.records.forget(uid) {
            tracing::error!(pod = uid, %error, "its record stays");
        }
        self.report(node_report::Report::Gone(node::PodGone { uid: uid.to_owned() }));
    }

    fn greet(&mut self, reports: mpsc::Sender<NodeReport>) {
        let hello = node::NodeHello {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pods: self.pods.values().map(|pod| seen(&pod.record)).collect(),
        };
        self.control = Some(reports);
        self.report(node_report::Report::Hello(hello));
        let uids: Vec<String> = self.pods.keys().cloned().collect();
        for uid in uids {
            self.report_state(&uid);
        }
    }

    fn report(&mut self, report: node_report::Report) {
        let report = NodeReport { report: Some(report) };
        if let Some(control) = &self.control
            && control.try_send(report).is_err()
        {
            // The stream is dead or drowning: it ends when its sender goes, and the next begins anew.
            self.control = None;
        }
    }

    fn report_state(&mut self, uid: &str) {
        let Some(pod) = self.pods.get(uid) else {
            return;
        };
        // Until its listeners are back, or have been given up, what was said of it before the restart stands.
        if pod.returning {
            return;
        }
        let (capture, reason) = pod.state.report();
        self.report(node_report::Report::State(node::PodState {
            uid: uid.to_owned(),
            capture: capture.into(),
            reason,
        }));
    }

    async fn order(&mut self, order: node::NodeOrder) {
        match order.order {
            Some(node_order::Order::Pod(order)) => self.order_pod(order).await,
            Some(node_order::Order::ForgetUid(uid)) => self.forget(&uid).await,
            Some(node_order::Order::Settings(settings)) => match Settings::try_from(&settings) {
                Ok(settings) => self.set(settings).await,
                Err(error) => tracing::error!(%error, "control's settings are not taken"),
            },
            Some(node_order::Order::Synced(_)) => tracing::info!("control has answered for every pod"),
            // An order of a later version.
            None => tracing::warn!("control sent an order that this version does not know"),
        }
    }

    async fn order_pod(&mut self, order: node::PodOrder) {
        let uid = order.uid.clone();
        let order = match PodOrder::try_from(&order) {
            Ok(order) => order,
            Err(error) => {
                tracing::error!(pod = uid, %error, "control's order is not taken");
                return;
            }
        };
        let Some(pod) = self.pods.get_mut(&uid) else {
            return;
        };
        let namespace = pod.record.namespace.clone();
        let changed = if order.namespace_apart {
            self.apart.insert(namespace)
        } else {
            self.apart.remove(&namespace)
        };
        if changed && let Err(error) = self.records.keep_apart(&self.apart) {
            tracing::error!(%error, "the list of namespaces apart is not kept");
        }
        pod.record.order = Some(order);
        if let Err(error) = self.records.keep(&pod.record) {
            tracing::error!(pod = uid, %error, "its record is not kept");
        }
        self.settle(&uid).await;
    }

    async fn set(&mut self, settings: Settings) {
        if self.node.settings.as_ref() == Some(&settings) {
            return;
        }
        if let Err(error) = self.records.keep_settings(&settings) {
            tracing::error!(%error, "the node's settings are not kept");
        }
        self.node.settings = Some(settings);
        self.settle_all().await;
    }

    async fn settle_all(&mut self) {
        let uids: Vec<String> = self.pods.keys().cloned().collect();
        for uid in uids {
            self.settle(&uid).await;
        }
    }

    fn joined(&mut self, instance: u64, outgoing: mpsc::Sender<Outgoing>) {
        self.instances.join(instance, outgoing);
        for pod in self.pods.values() {
            if let (State::Captured | State::Draining { .. }, Some(order)) = (&pod.state, &pod.record.order) {
                let outgoing = Outgoing {
                    message: from_agent::Message::AddPod(pod.announcement(order)),
                    fds: pod.listener_fds(),
                };
                self.instances.tell(instance, outgoing);
            }
        }
        self.instances
            .tell(instance, from_agent::Message::Synced(agent::Synced {}).into());
    }

    async fn said(&mut self, instance: u64, message: from_ztunnel::Message, fds: Vec<OwnedFd>) {
        match message {
            from_ztunnel::Message::Ready(_) => self.instances.ready(instance),
            from_ztunnel::Message::Declare(declare) => {
                let error = self.declare(&declare).await.err().unwrap_or_default();
                let declared = agent::Declared {
                    id: declare.id,
                    error,
                };
                self.instances
                    .tell(instance, from_agent::Message::Declared(declared).into());
            }
            from_ztunnel::Message::ReturnListeners(returned) => self.take_back(instance, returned, fds).await,
            from_ztunnel::Message::PodClosed(closed) => self.closed(&closed.uid).await,
            from_ztunnel::Message::PodAccepted(_) | from_ztunnel::Message::Alive(_) => {}
            from_ztunnel::Message::Hello(_) | from_ztunnel::Message::WantSockets(_) => {
                tracing::debug!(instance, "a message out of place");
            }
        }
    }

    async fn declare(&mut self, declare: &agent::Declare) -> Result<(), String> {
        let ip = address(&declare.address).map_err(|e| e.to_string())?;
        let port = port(declare.port).map_err(|e| e.to_string())?;
        let pod = self.pods.get_mut(&declare.uid).ok_or("no such pod")?;
        match &mut pod.guard {
            Some(guard) => guard
                .declare(SocketAddr::new(ip, port))
                .await
                .map_err(|e| e.to_string()),
            None => Ok(()),
        }
    }

    /// Takes back what ztunnel held while the agent was away (settled D2).
    async fn take_back(&mut self, instance: u64, returned: agent::ReturnListeners, fds: Vec<OwnedFd>) {
        let Some(pod) = self.pods.get_mut(&returned.uid).filter(|_| is_uid(&returned.uid)) else {
            self.instances.tell(instance, gone(&returned.uid));
            return;
        };
        if !pod.listeners.is_empty() || fds.len() != returned.listeners.len() || fds.is_empty() {
            return;
        }
        if let Err(reason) = found_by(pod, &fds) {
            tracing::error!(pod = returned.uid, reason, "listeners are not taken back");
            return;
        }
        let resolvers = self.node.settings.clone().unwrap_or_default().resolvers;
        let mut kept = vec![];
        for (what, fd) in returned.listeners.into_iter().zip(fds) {
            match listeners::adopt(what, fd, pod.cookie, pod.record.marks.socket, &resolvers) {
                Ok(listener) => kept.push(listener),
                Err(error) => tracing::error!(pod = returned.uid, %error, "a listener is not taken back"),
            }
        }
        if kept.len() == listeners::count(&resolvers) {
            pod.take_back(kept, &resolvers);
        }
        self.settle(&returned.uid).await;
    }

    async fn closed(&mut self, uid: &str) {
        if let Some(pod) = self.pods.get_mut(uid)
            && let State::Draining { until } = pod.state
            && Instant::now() >= until
        {
            self.end_drain(uid).await;
        }
    }

    /// One look at every pod.
    async fn look(&mut self) {
        self.looks += 1;
        if self.looks == LOOKS_FOR_RETURN {
            self.pods.values_mut().for_each(|pod| pod.returning = false);
            self.settle_all().await;
        }
        if self.looks.is_multiple_of(LOOKS_PER_ADDRESSES) {
            let addresses = node_addresses().await;
            if addresses != self.node.addresses {
                self.node.addresses = addresses;
                self.settle_all().await;
            }
        }
        match self.node.host.generation().await {
            Ok(host) => {
                let uids: Vec<String> = self.pods.keys().cloned().collect();
                for uid in uids {
                    self.look_at(&uid, host).await;
                }
            }
            Err(error) => tracing::error!(%error, "the host's rules cannot be looked at"),
        }
        if self.looks.is_multiple_of(LOOKS_PER_REPORT) {
            let stats = self.stats().await;
            self.instances.tell_all(from_agent::Message::Stats(stats).into());
        }
    }

    async fn look_at(&mut self, uid: &str, host: u32) {
        let Some(pod) = self.pods.get_mut(uid) else {
            return;
        };
        match pod.state {
            State::Idle => {
                if self.waiting.contains_key(uid) {
                    self.drop_given_up(uid);
                    self.settle(uid).await;
                }
            }
            State::Broken(_) => self.settle(uid).await,
            State::Draining { until } => {
                if Instant::now() >= until {
                    self.end_drain(uid).await;
                }
            }
            State::Captured => {
                let Some(defect) = pod.defect(host).await else {
                    self.end_grace(uid).await;
                    return;
                };
                tracing::error!(pod = uid, reason = defect, "capture was broken; repairing it");
                pod.state = State::Broken(defect);
                let repaired = pod.repair().await;
                self.repairs += 1;
                self.report_state(uid);
                if let Err(error) = repaired {
                    tracing::error!(pod = uid, %error, "capture could not be repaired; trying again");
                    return;
                }
                self.settle(uid).await;
            }
        }
    }

    /// Connections from before enrolment have had their grace: the guard closes on them.
    async fn end_grace(&mut self, uid: &str) {
        if let Some(pod) = self.pods.get_mut(uid)
            && pod.grace_is_over(&self.node)
        {
            self.settle(uid).await;
        }
    }

    async fn end_drain(&mut self, uid: &str) {
        self.sources.remove(uid);
        self.instances.tell_all(gone(uid));
        let Some(pod) = self.pods.get_mut(uid) else {
            return;
        };
        if let Err(error) = pod.end_drain().await {
            tracing::error!(pod = uid, %error, "the rules could not be removed; trying again");
        }
        self.report_state(uid);
    }

    /// Callers that have given up no longer wait.
    fn drop_given_up(&mut self, uid: &str) {
        if let Some(waiting) = self.waiting.get_mut(uid) {
            waiting.retain(|reply| !reply.is_closed());
            if waiting.is_empty() {
                self.waiting.remove(uid);
            }
        }
    }

    async fn stats(&self) -> agent::AgentStats {
        let mut stats = agent::AgentStats {
            repairs_total: self.repairs,
            verifications_total: self.looks,
            cpu_seconds: cpu_seconds(),
            ..Default::default()
        };
        for (uid, pod) in &self.pods {
            let (_, reason) = pod.state.report();
            let state = match pod.state {
                State::Idle => agent::PodCaptureState::NotCaptured,
                State::Captured => agent::PodCaptureState::Captured,
                State::Draining { .. } => agent::PodCaptureState::Draining,
                State::Broken(_) => agent::PodCaptureState::Broken,
            };
            stats.pods.push(agent::PodCapture {
                uid: uid.clone(),
                captured: pod.state == State::Captured,
                reason,
                state: state.into(),
            });
            if let Some(guard) = &pod.guard {
                stats.guard_dropped_total += guard.dropped().await.unwrap_or_default();
            }
        }
        stats
    }
}

/// Finds a pod's namespace by its listeners, when no path leads there any more.
fn found_by(pod: &mut Pod, fds: &[OwnedFd]) -> Result<(), String> {
    if pod.netns.is_some() {
        return Ok(());
    }
    let [first, ..] = fds else {
        return Err("no listener came back".to_owned());
    };
    let netns = culvert_io::sys::netns_of(first).map_err(|e| e.to_string())?;
    let netns = Netns::new(netns);
    // The record's inode proves that it is the pod's own, whoever sent the socket.
    if netns.key().map_err(|e| e.to_string())? != pod.record.netns {
        return Err("the namespace is not the pod's".to_owned());
    }
    pod.settle_in(netns).map_err(|e| e.to_string())
}

fn gone(uid: &str) -> Outgoing {
    from_agent::Message::PodGone(agent::PodGone { uid: uid.to_owned() }).into()
}

fn seen(record: &Record) -> node::PodSeen {
    node::PodSeen {
        uid: record.uid.clone(),
        namespace: record.namespace.clone(),
        name: record.name.clone(),
        addresses: record
            .addresses
            .iter()
            .map(|ip| crate::orders::octets(*ip))
            .collect(),
    }
}

/// All addresses of the node but the loopback's.
async fn node_addresses() -> Vec<IpAddr> {
    let read = async {
        let route = Connection::<Route>::new()?;
        route.get_addresses().await
    };
    match read.await {
        Ok(addresses) => {
            let mut ips: Vec<IpAddr> = addresses
                .iter()
                .filter_map(|a| a.local().or(a.address()).copied())
                .filter(|ip| !ip.is_loopback())
                .collect();
            ips.sort();
            ips.dedup();
            ips
        }
        Err(error) => {
            tracing::error!(%error, "the node's addresses cannot be read; probes may be refused");
            vec![]
        }
    }
}

fn cpu_seconds() -> f64 {
    let Ok(usage) = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF) else {
        return 0.0;
    };
    let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}

#[cfg(test)]
mod tests;
