//! Orders for nodes' agents: which pods take part and how, and what the agents report of them.

use super::Shared;
use super::limits::Budget;
use crate::config::Profile;
use crate::index::{Capture, PodFacts, Report, World, grace_seconds, octets};
use culvert_proto::node::{
    CaptureState, Cidr, Exclusions, NodeOrder, NodeReport, NodeSettings, PodOrder, PodSeen, Synced,
    node_order, node_report, node_service_server::NodeService,
};
use futures::Stream;
use ipnet::IpNet;
use std::{
    collections::{BTreeMap, BTreeSet},
    pin::Pin,
    sync::Arc,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, async_trait};

pub struct Nodes(pub Arc<Shared>);

#[async_trait]
impl NodeService for Nodes {
    type AttendStream = Pin<Box<dyn Stream<Item = Result<NodeOrder, Status>> + Send>>;

    async fn attend(
        &self,
        request: Request<Streaming<NodeReport>>,
    ) -> Result<Response<Self::AttendStream>, Status> {
        let node = self.0.tokens.node(&request)?;
        self.0.limits.spend(&node, Budget::Streams, 1)?;
        let (orders, out) = mpsc::channel(256);
        let attendance = Attendance {
            node,
            shared: self.0.clone(),
            orders,
            seen: BTreeSet::new(),
            ordered: BTreeMap::new(),
            number: 0,
        };
        tokio::spawn(attendance.run(request.into_inner()));
        Ok(Response::new(Box::pin(ReceiverStream::new(out))))
    }
}

/// One agent's stream.
struct Attendance {
    node: String,
    shared: Arc<Shared>,
    orders: mpsc::Sender<Result<NodeOrder, Status>>,
    /// Pods that the agent has reported.
    seen: BTreeSet<String>,
    /// The last order of each.
    ordered: BTreeMap<String, PodOrder>,
    /// The world that orders were made from.
    number: u64,
}

/// The agent has closed its stream.
struct Closed;

impl Attendance {
    async fn run(mut self, mut reports: Streaming<NodeReport>) {
        let mut world = self.shared.world.clone();
        let _open = self.shared.metrics.stream("orders");
        let settings = self.settings();
        if self.send(node_order::Order::Settings(settings)).await.is_err() {
            return;
        }
        loop {
            let done = tokio::select! {
                report = reports.message() => match report {
                    Ok(Some(NodeReport { report: Some(report) })) => self.take(report).await,
                    Ok(Some(NodeReport { report: None })) => Ok(()),
                    Ok(None) | Err(_) => Err(Closed),
                },
                changed = world.changed() => match changed {
                    Ok(()) => self.order_changed().await,
                    Err(_) => Err(Closed),
                },
            };
            if done.is_err() {
                tracing::info!(node = self.node, "agent has left");
                return;
            }
        }
    }

    async fn send(&self, order: node_order::Order) -> Result<(), Closed> {
        self.orders
            .send(Ok(NodeOrder { order: Some(order) }))
            .await
            .map_err(|_| Closed)
    }

    fn settings(&self) -> NodeSettings {
        let settings = &self.shared.settings;
        NodeSettings {
            resolvers: settings.resolvers.iter().map(|ip| octets(*ip)).collect(),
            mesh_ranges: settings.mesh_ranges.iter().map(|net| cidr(*net)).collect(),
            refuse_other_traffic: settings.profile == Profile::High,
            enrolment_grace_seconds: grace_seconds(settings.profile),
        }
    }

    async fn take(&mut self, report: node_report::Report) -> Result<(), Closed> {
        match report {
            node_report::Report::Hello(hello) => {
                tracing::info!(
                    node = self.node,
                    version = hello.version,
                    pods = hello.pods.len(),
                    "agent has come"
                );
                let uids: Vec<String> = hello.pods.iter().map(|pod| pod.uid.clone()).collect();
                for pod in hello.pods {
                    self.see(pod);
                }
                let node = self.node.clone();
                self.report(Report::Hello { node, uids }).await?;
                self.order_all().await?;
                self.send(node_order::Order::Synced(Synced {})).await
            }
            node_report::Report::Seen(pod) => {
                let uid = pod.uid.clone();
                self.see(pod);
                let world = self.shared.world.borrow().clone();
                self.order(&world, &uid).await
            }
            node_report::Report::Gone(gone) => {
                self.seen.remove(&gone.uid);
                self.ordered.remove(&gone.uid);
                let node = self.node.clone();
                self.report(Report::Gone { node, uid: gone.uid }).await
            }
            node_report::Report::State(state) => {
                let capture = match CaptureState::try_from(state.capture) {
                    Ok(CaptureState::Captured) => Capture::Captured,
                    Ok(CaptureState::Broken) => Capture::Broken,
                    Ok(CaptureState::NotCaptured | CaptureState::Draining) | Err(_) => Capture::None,
                };
                if !state.reason.is_empty() {
                    tracing::warn!(
                        node = self.node,
                        pod = state.uid,
                        reason = state.reason,
                        "capture is not as ordered"
                    );
                }
                let (node, uid) = (self.node.clone(), state.uid);
                self.report(Report::State { node, uid, capture }).await
            }
        }
    }

    fn see(&mut self, pod: PodSeen) {
        self.seen.insert(pod.uid);
    }

    /// Passes an agent's word on, for pods of its own node alone.
    async fn report(&self, report: Report) -> Result<(), Closed> {
        if let Report::State { uid, .. } | Report::Gone { uid, .. } = &report
            && let Some(pod) = self.shared.world.borrow().pod(uid)
            && pod.node != self.node
        {
            tracing::warn!(target: "audit", node = self.node, pod = uid, "report about another node's pod ignored");
            return Ok(());
        }
        self.shared.reports.send(report).await.map_err(|_| Closed)
    }

    /// Sends orders for what has changed since the last world looked at.
    async fn order_changed(&mut self) -> Result<(), Closed> {
        let world: Arc<World> = self.shared.world.borrow().clone();
        let Some(steps) = world.since(self.number) else {
            return self.order_all().await;
        };
        let changed: BTreeSet<&str> = steps.flat_map(|step| step.pods()).map(AsRef::as_ref).collect();
        for uid in changed {
            self.order(&world, uid).await?;
        }
        self.number = world.number;
        Ok(())
    }

    async fn order_all(&mut self) -> Result<(), Closed> {
        let world: Arc<World> = self.shared.world.borrow().clone();
        let uids: BTreeSet<String> = self.seen.iter().chain(self.ordered.keys()).cloned().collect();
        for uid in uids {
            self.order(&world, &uid).await?;
        }
        self.number = world.number;
        Ok(())
    }

    /// Sends a pod's order if it is another one than the last.
    async fn order(&mut self, world: &World, uid: &str) -> Result<(), Closed> {
        match world.pod(uid) {
            None => {
                if self.ordered.remove(uid).is_some() {
                    self.send(node_order::Order::ForgetUid(uid.to_owned())).await?;
                }
            }
            Some(pod) if pod.node == self.node && self.seen.contains(uid) => {
                let order = order(pod);
                if self.ordered.get(uid) != Some(&order) {
                    self.ordered.insert(uid.to_owned(), order.clone());
                    self.send(node_order::Order::Pod(order)).await?;
                }
            }
            // Not seen yet, or another node's: it is held until an object puts it here.
            Some(_) => {}
        }
        Ok(())
    }
}

fn cidr(net: IpNet) -> Cidr {
    Cidr {
        address: octets(net.network()),
        length: net.prefix_len().into(),
    }
}

fn order(pod: &PodFacts) -> PodOrder {
    let ports = |list: &[u16]| list.iter().map(|port| u32::from(*port)).collect();
    PodOrder {
        uid: pod.uid.clone(),
        enrolled: pod.enrolled,
        spiffe_id: pod.identity.to_string(),
        probe_ports: ports(&pod.probe_ports),
        exclusions: Some(Exclusions {
            inbound_ports: ports(&pod.exclude_inbound_ports),
            outbound_ports: ports(&pod.exclude_outbound_ports),
            outbound_cidrs: pod.exclude_outbound_nets.iter().map(|net| cidr(*net)).collect(),
        }),
        refuse_plaintext: pod.refuse_plaintext,
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        service_account: pod.service_account.clone(),
        workload_uid: pod.workload_uid.clone(),
        namespace_apart: pod.namespace_apart,
    }
}
