//! One pod: brought to what control orders, and looked at ever after.
//!
//! ```text
//! idle ──enrol──▶ captured ──un-enrol──▶ draining ──time is up──▶ idle
//!                  ▲    │ looked at, repaired
//!                  └─ broken: the guard stays, capture is tried again
//! ```
//! Invariant: the guard on the host is in place before anything in the pod is, and goes after it; the pod
//! is captured only once its listeners work and the kernel has shown its rules. From outside to inside and back
//! new connections wait for the moment that it takes (`Gate`), so that none is lost between the two.

use crate::{
    capture::{Capture, Gate, Rules},
    guard::{Guard, GuardRules, Host},
    listeners::{self, Kept, ListenError},
    netns::{NetlinkError, Netns},
    orders::{PodOrder, Settings, octets},
    records::Record,
};
use culvert_proto::{agent, node::CaptureState};
use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

/// What a pod is, seen from the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    Idle,
    Captured,
    Draining { until: Instant },
    Broken(String),
}

impl State {
    pub fn report(&self) -> (CaptureState, String) {
        match self {
            Self::Idle => (CaptureState::NotCaptured, String::new()),
            Self::Captured => (CaptureState::Captured, String::new()),
            Self::Draining { .. } => (CaptureState::Draining, String::new()),
            Self::Broken(reason) => (CaptureState::Broken, reason.clone()),
        }
    }
}

/// Why a pod is not as ordered.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    #[error("control has not said yet what the node's settings are")]
    NoSettings,
    #[error("its namespace was not found again after a restart: {0}")]
    Lost(String),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("rules: {0}")]
    Rules(NetlinkError),
    #[error("host guard: {0}")]
    Guard(NetlinkError),
}

/// What all pods of a node share.
pub struct NodeView {
    pub host: Host,
    pub settings: Option<Settings>,
    /// Addresses of the node, from which probes come.
    pub addresses: Vec<IpAddr>,
}

pub struct Pod {
    pub record: Record,
    pub netns: Option<Netns>,
    pub cookie: u64,
    pub listeners: Vec<Kept>,
    pub state: State,
    capture: Option<Capture>,
    pub guard: Option<Guard>,
    /// Since when connections from before enrolment have their grace; none if none can be open: the pod
    /// was held at its start until it was captured, or was captured by an earlier agent.
    grace_from: Option<Instant>,
    /// The pod has run, or may have run, outside of the mesh.
    pub ran_outside: bool,
    /// The agent has just started: ztunnel may hold this pod's listeners and is about to give them back.
    pub returning: bool,
    /// Resolvers that the DNS listeners were made for.
    resolvers: Vec<IpAddr>,
}

impl Pod {
    pub fn new(record: Record) -> Self {
        Self {
            record,
            netns: None,
            cookie: 0,
            listeners: vec![],
            state: State::Idle,
            capture: None,
            guard: None,
            grace_from: None,
            ran_outside: false,
            returning: false,
            resolvers: vec![],
        }
    }

    /// Takes the pod's namespace; another one than before takes the old one's place, and what was made
    /// there is let go.
    pub fn settle_in(&mut self, netns: Netns) -> std::io::Result<()> {
        let cookie = netns.cookie()?;
        if self.cookie != cookie {
            self.listeners.clear();
            self.capture = None;
            self.state = State::Idle;
        }
        self.record.netns = netns.key()?;
        self.cookie = cookie;
        self.netns = Some(netns);
        Ok(())
    }

    /// Brings the pod to `order`. It may be called at any time and does only what is missing.
    pub async fn enrol(&mut self, order: &PodOrder, node: &NodeView) -> Result<(), EnrolError> {
        let settings = node.settings.as_ref().ok_or(EnrolError::NoSettings)?;
        // A pod that was held until now has no connections that could meet half of it.
        let gate = if self.ran_outside && self.state != State::Captured {
            self.shut_gate().await?
        } else {
            None
        };
        let outcome = self.take_in(order, node, settings).await;
        outcome.and(open_gate(gate).await)
    }

    async fn shut_gate(&self) -> Result<Option<Gate>, EnrolError> {
        match &self.netns {
            Some(netns) => {
                let gate = Gate::shut(netns, self.record.marks).await;
                Ok(Some(gate.map_err(EnrolError::Rules)?))
            }
            None => Ok(None),
        }
    }

    async fn take_in(
        &mut self,
        order: &PodOrder,
        node: &NodeView,
        settings: &Settings,
    ) -> Result<(), EnrolError> {
        if self.ran_outside && self.grace_from.is_none() {
            self.grace_from = Some(Instant::now());
        }
        self.stand_guard(order, node, settings).await?;
        let netns = self.netns.clone();
        let netns = netns.ok_or_else(|| EnrolError::Lost(format!("inode {}", self.record.netns.1)))?;
        self.listen(&netns, &settings.resolvers)?;
        let rules = self.rules(order, node, settings);
        match &mut self.capture {
            Some(capture) if *capture.rules() == rules && self.state == State::Captured => {}
            Some(capture) => capture.replace(rules).await.map_err(EnrolError::Rules)?,
            None => {
                let capture = Capture::install(&netns, rules).await;
                self.capture = Some(capture.map_err(EnrolError::Rules)?);
            }
        }
        self.state = State::Captured;
        Ok(())
    }

    /// Whether connections from before enrolment are still let through, and no longer should be.
    pub fn grace_is_over(&self, node: &NodeView) -> bool {
        let Some(settings) = &node.settings else {
            return false;
        };
        let open = self
            .guard
            .as_ref()
            .is_some_and(|guard| guard.rules().mesh_nets != settings.mesh_nets);
        let spared = self
            .capture
            .as_ref()
            .is_some_and(|capture| capture.rules().spare_older);
        !self.has_grace(settings) && (open || spared)
    }

    fn rules(&self, order: &PodOrder, node: &NodeView, settings: &Settings) -> Rules {
        Rules {
            marks: self.record.marks,
            resolvers: settings.resolvers.clone(),
            node: node.addresses.clone(),
            probe_ports: order.probe_ports.clone(),
            exclude_inbound_ports: order.exclude_inbound_ports.clone(),
            exclude_outbound_ports: order.exclude_outbound_ports.clone(),
            exclude_outbound_nets: order.exclude_outbound_nets.clone(),
            refuse_other_traffic: settings.refuse_other_traffic,
            spare_older: self.has_grace(settings),
        }
    }

    fn has_grace(&self, settings: &Settings) -> bool {
        self.grace_from
            .is_some_and(|since| since.elapsed() < settings.enrolment_grace)
    }

    async fn stand_guard(
        &mut self,
        order: &PodOrder,
        node: &NodeView,
        settings: &Settings,
    ) -> Result<(), EnrolError> {
        if self.record.host_ifindex == 0 {
            return Ok(());
        }
        let rules = GuardRules {
            resolvers: settings.resolvers.clone(),
            mesh_nets: if self.has_grace(settings) {
                vec![]
            } else {
                settings.mesh_nets.clone()
            },
            node: node.addresses.clone(),
            probe_ports: order.probe_ports.clone(),
            inbound_ports: order.exclude_inbound_ports.clone(),
            outbound_ports: order.exclude_outbound_ports.clone(),
            outbound_nets: order.exclude_outbound_nets.clone(),
            refuse_plaintext: order.refuse_plaintext,
            refuse_other_traffic: settings.refuse_other_traffic,
        };
        match &mut self.guard {
            Some(guard) if *guard.rules() == rules => Ok(()),
            Some(guard) => guard.replace(rules).await,
            None => match Guard::stand(&node.host, self.record.host_ifindex, rules).await {
                Ok(guard) => {
                    self.guard = Some(guard);
                    Ok(())
                }
                Err(error) => Err(error),
            },
        }
        .map_err(EnrolError::Guard)
    }

    fn listen(&mut self, netns: &Netns, resolvers: &[IpAddr]) -> Result<(), EnrolError> {
        for listener in self.listeners.iter().filter(|listener| !listener.works()) {
            listener.revive();
        }
        if self.resolvers != resolvers || !self.listeners.iter().all(Kept::works) {
            self.listeners.clear();
        }
        if self.listeners.is_empty() {
            self.listeners = listeners::listen(netns, self.record.marks.socket, resolvers)?;
            self.resolvers = resolvers.to_vec();
        }
        Ok(())
    }

    /// Takes back listeners that ztunnel held while the agent was away.
    pub fn take_back(&mut self, listeners: Vec<Kept>, resolvers: &[IpAddr]) {
        self.listeners = listeners;
        self.resolvers = resolvers.to_vec();
        self.returning = false;
    }

    /// Lets new connections pass by, keeps the open ones until `drain` is over (settled D7).
    pub async fn begin_drain(&mut self, drain: Duration) -> Result<(), EnrolError> {
        let gate = self.shut_gate().await?;
        let outcome = self.let_out(drain).await;
        outcome.and(open_gate(gate).await)
    }

    async fn let_out(&mut self, drain: Duration) -> Result<(), EnrolError> {
        if let Some(guard) = self.guard.take() {
            guard.leave().await.map_err(EnrolError::Guard)?;
        }
        if let Some(capture) = &mut self.capture {
            capture.drain().await.map_err(EnrolError::Rules)?;
        }
        self.ran_outside = true;
        self.grace_from = None;
        self.state = State::Draining {
            until: Instant::now() + drain,
        };
        Ok(())
    }

    /// The pod is to be outside and nothing of this process's is in it. What an earlier agent was taking out of
    /// the mesh has its time once more.
    pub async fn stay_out(&mut self, drain: Duration) -> Result<(), EnrolError> {
        self.leave();
        if let Some(netns) = &self.netns
            && Capture::is_left(netns).await.map_err(EnrolError::Rules)?
        {
            self.state = State::Draining {
                until: Instant::now() + drain,
            };
        }
        Ok(())
    }

    /// Ends capture: ztunnel has closed what it had, or its time is up.
    pub async fn end_drain(&mut self) -> Result<(), EnrolError> {
        if let Some(netns) = &self.netns {
            let removed = Capture::remove(netns, self.record.marks).await;
            removed.map_err(EnrolError::Rules)?;
        }
        self.capture = None;
        self.listeners.clear();
        self.leave();
        Ok(())
    }

    /// The pod is outside of the mesh from now on.
    pub fn leave(&mut self) {
        self.ran_outside = true;
        self.grace_from = None;
        self.state = State::Idle;
    }

    /// Takes the guard away with the pod itself.
    pub async fn gone(mut self) {
        if let Some(guard) = self.guard.take()
            && let Err(error) = guard.leave().await
        {
            // The link goes with the pod, and its hook with the link.
            tracing::debug!(pod = self.record.uid, %error, "the guard was gone already");
        }
    }

    /// Looks at everything that was put in place, at this generation of the host's rules, and says what is
    /// missing.
    pub async fn defect(&mut self, host: u32) -> Option<String> {
        if !self.listeners.iter().all(Kept::works) {
            return Some("a listener is lost".to_owned());
        }
        if let Some(capture) = &mut self.capture {
            match capture.is_intact().await {
                Ok(true) => {}
                Ok(false) => return Some("the rules in the pod were changed".to_owned()),
                Err(error) => return Some(format!("the rules cannot be looked at: {error}")),
            }
        }
        if let Some(guard) = &mut self.guard {
            match guard.is_intact(host).await {
                Ok(true) => {}
                Ok(false) => return Some("the host guard was changed".to_owned()),
                Err(error) => return Some(format!("the host guard cannot be looked at: {error}")),
            }
        }
        None
    }

    /// Puts everything in place again.
    pub async fn repair(&mut self) -> Result<(), EnrolError> {
        if let Some(guard) = &mut self.guard {
            guard.repair().await.map_err(EnrolError::Guard)?;
        }
        if let Some(capture) = &mut self.capture {
            capture.repair().await.map_err(EnrolError::Rules)?;
        }
        Ok(())
    }

    /// What ztunnel is told.
    pub fn announcement(&self, order: &PodOrder) -> agent::AddPod {
        let addresses = self.record.addresses.iter().map(|ip| octets(*ip)).collect();
        agent::AddPod {
            pod: Some(agent::Pod {
                uid: self.record.uid.clone(),
                namespace: self.record.namespace.clone(),
                name: self.record.name.clone(),
                service_account: order.service_account.clone(),
                spiffe_id: order.spiffe_id.clone(),
                workload_uid: order.workload_uid.clone(),
                addresses,
                netns_cookie: self.cookie,
                refuse_plaintext: order.refuse_plaintext,
                probe_ports: order.probe_ports.iter().map(|port| (*port).into()).collect(),
            }),
            listeners: self.listeners.iter().map(|kept| kept.what.clone()).collect(),
        }
    }

    pub fn listener_fds(&self) -> Vec<Arc<std::os::fd::OwnedFd>> {
        self.listeners.iter().map(|kept| kept.socket.clone()).collect()
    }
}

async fn open_gate(gate: Option<Gate>) -> Result<(), EnrolError> {
    match gate {
        Some(gate) => gate.open().await.map_err(EnrolError::Rules),
        None => Ok(()),
    }
}
