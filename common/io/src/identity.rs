//! SVIDs of the workloads on this node: fetched, renewed at half life, dropped with the last of them.
//!
//! ```text
//! acquire(id) ──▶ fetch task per identity ──CSR──▶ control's CA ──▶ Svid + TrustBundles ──watch──▶ tunnels
//! ```
//! Invariant: a key is made here, for one identity, and leaves memory when the last workload of that
//! identity has left. What the CA answers is taken only if it is what was asked for; otherwise the SVID
//! in hand stays until it ends.

use crate::{
    control::{Control, ControlError, Credentials},
    tls::{BundleError, Svid, SvidError, TrustBundles, VerifyError},
};
use culvert_core::ids::{SpiffeId, TrustDomain};
use culvert_proto::ca::{
    IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
};
use parking_lot::Mutex;
use rcgen::{CertificateParams, KeyPair, SanType};
use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};
use tokio::sync::{Semaphore, watch};
use tonic::{service::interceptor::InterceptedService, transport::Channel};

/// An SVID and what its peers are verified against; they arrive together.
#[derive(Debug, Clone)]
pub struct Credential {
    pub svid: Svid,
    pub bundles: Arc<TrustBundles>,
}

/// Requests to the CA under way at once.
const IN_FLIGHT: usize = 8;

/// Life that is asked for; the CA may give less.
const LIFETIME: Duration = Duration::from_secs(3600);

/// How long one request may take.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// Longest pause between two tries after a failure.
const LONGEST_PAUSE: Duration = Duration::from_secs(150);

/// Most certificates in an answer's elements together.
const MAX_ELEMENTS: usize = 6;

/// Why no SVID came.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    #[error("the CA did not answer within {} s", REQUEST_DEADLINE.as_secs())]
    Timeout,
    #[error("the CA refused: {0}")]
    Refused(String),
    #[error("making the request: {0}")]
    Request(#[from] rcgen::Error),
    #[error("the answer has {0} elements")]
    Shape(usize),
    #[error("the answer is no SVID: {0}")]
    Svid(#[from] SvidError),
    #[error("the answer's roots: {0}")]
    Roots(#[from] BundleError),
    #[error("no peer would take the answer: {0}")]
    Unverified(#[from] VerifyError),
    #[error("asked for {asked}, got {got}")]
    OtherId { asked: SpiffeId, got: SpiffeId },
    #[error("the answer is not valid now")]
    NotNow,
}

/// Issues and keeps the node's SVIDs. Clones share them.
#[derive(Clone)]
pub struct Identities(Arc<Store>);

struct Store {
    issuer: Issuer,
    in_flight: Semaphore,
    held: Mutex<HashMap<SpiffeId, Weak<Entry>>>,
    issued: AtomicU64,
    failed: AtomicU64,
    /// Tasks run here, whichever thread asks.
    runtime: tokio::runtime::Handle,
}

struct Entry {
    id: SpiffeId,
    current: watch::Sender<Option<Credential>>,
    task: Mutex<Option<tokio::task::AbortHandle>>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Some(task) = self.task.lock().take() {
            task.abort();
        }
    }
}

/// Keeps one identity's SVID while a workload has it. Clones count as the same.
#[derive(Clone)]
pub struct Lease(Arc<Entry>);

impl Lease {
    pub fn id(&self) -> &SpiffeId {
        &self.0.id
    }

    /// The SVID in hand, if it is valid now.
    pub fn current(&self) -> Option<Credential> {
        let current = self.0.current.borrow();
        current
            .as_ref()
            .filter(|held| held.svid.not_after() > SystemTime::now())
            .cloned()
    }

    /// Waits for a valid SVID, at most `patience`.
    pub async fn wait(&self, patience: Duration) -> Option<Credential> {
        if let Some(held) = self.current() {
            return Some(held);
        }
        let mut changes = self.0.current.subscribe();
        let arrived = async {
            loop {
                if let Some(held) = self.current() {
                    return Some(held);
                }
                changes.changed().await.ok()?;
            }
        };
        // Boxed, as everywhere on a connection's way: what seldom waits takes no room in those that do not.
        Box::pin(tokio::time::timeout(patience, arrived))
            .await
            .ok()
            .flatten()
    }

    /// Tells when the SVID or its bundles are replaced.
    pub fn changes(&self) -> watch::Receiver<Option<Credential>> {
        self.0.current.subscribe()
    }
}

impl Identities {
    /// Must be called inside the runtime that shall renew.
    pub fn new(control: &Control) -> Result<Self, ControlError> {
        let issuer = Issuer {
            service: IstioCertificateServiceClient::with_interceptor(
                control.channel()?,
                control.credentials(),
            ),
        };
        Ok(Self(Arc::new(Store {
            issuer,
            in_flight: Semaphore::new(IN_FLIGHT),
            held: Mutex::default(),
            issued: AtomicU64::default(),
            failed: AtomicU64::default(),
            runtime: tokio::runtime::Handle::current(),
        })))
    }

    /// Keeps an SVID of `id` from now on; it is fetched at once.
    pub fn acquire(&self, id: &SpiffeId) -> Lease {
        let mut held = self.0.held.lock();
        if let Some(entry) = held.get(id).and_then(Weak::upgrade) {
            return Lease(entry);
        }
        held.retain(|_, entry| entry.strong_count() > 0);
        let entry = Arc::new(Entry {
            id: id.clone(),
            current: watch::Sender::new(None),
            task: Mutex::default(),
        });
        held.insert(id.clone(), Arc::downgrade(&entry));
        let task = keep(self.0.clone(), Arc::downgrade(&entry), id.clone());
        *entry.task.lock() = Some(self.0.runtime.spawn(task).abort_handle());
        Lease(entry)
    }

    /// Requests to the CA so far that brought an SVID, and those that did not.
    pub fn requests(&self) -> (u64, u64) {
        let Store { issued, failed, .. } = &*self.0;
        (issued.load(Ordering::Relaxed), failed.load(Ordering::Relaxed))
    }

    /// The identities held, with their SVIDs.
    pub fn all(&self) -> Vec<(SpiffeId, Option<Credential>)> {
        let held = self.0.held.lock();
        held.values()
            .filter_map(Weak::upgrade)
            .map(|entry| (entry.id.clone(), entry.current.borrow().clone()))
            .collect()
    }
}

/// Fetches, then renews at half life, for as long as the entry lives.
async fn keep(store: Arc<Store>, entry: Weak<Entry>, id: SpiffeId) {
    let mut failures = 0u32;
    // Once the CA is back, no more than one renewal's time passes until it is asked again (F13).
    let mut longest = LONGEST_PAUSE;
    loop {
        let issued = {
            let Ok(_permit) = store.in_flight.acquire().await else {
                return;
            };
            store.issuer.issue(&id).await
        };
        let Some(held) = entry.upgrade() else { return };
        let pause = match issued {
            Ok(credential) => {
                store.issued.fetch_add(1, Ordering::Relaxed);
                failures = 0;
                let pause = until_renewal(&credential.svid);
                longest = pause.min(LONGEST_PAUSE);
                tracing::info!(%id, serial = credential.svid.serial(), renew_in = ?pause, "SVID issued");
                held.current.send_replace(Some(credential));
                pause
            }
            Err(error) => {
                store.failed.fetch_add(1, Ordering::Relaxed);
                failures = failures.saturating_add(1);
                let pause = Duration::from_millis(500)
                    .saturating_mul(1 << failures.saturating_sub(1).min(9))
                    .min(longest)
                    .mul_f64(rand::random_range(0.8..1.2));
                tracing::error!(%id, %error, retry_in = ?pause, "no SVID issued; keeping the one in hand");
                pause
            }
        };
        drop(held);
        sleep_by_wall_clock(pause).await;
    }
}

/// Half of the life that is left, spread by ±10 % so that a node's identities do not renew together.
fn until_renewal(svid: &Svid) -> Duration {
    let life = svid
        .not_after()
        .duration_since(SystemTime::now())
        .unwrap_or_default();
    life.mul_f64(0.5 * rand::random_range(0.9..1.1))
}

/// Sleeps in steps, so that a suspended host or a clock that was set does not miss a renewal.
async fn sleep_by_wall_clock(pause: Duration) {
    const STEP: Duration = Duration::from_secs(10);
    let end = SystemTime::now() + pause;
    while let Ok(left) = end.duration_since(SystemTime::now()) {
        // A clock set back must not stretch the sleep.
        tokio::time::sleep(left.min(STEP).min(pause)).await;
    }
}

struct Issuer {
    service: IstioCertificateServiceClient<InterceptedService<Channel, Credentials>>,
}

impl Issuer {
    async fn issue(&self, id: &SpiffeId) -> Result<Credential, IssueError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        let csr = params.serialize_request(&key)?.pem()?;
        let impersonated = prost_types::Value {
            kind: Some(prost_types::value::Kind::StringValue(id.as_str().to_owned())),
        };
        let request = IstioCertificateRequest {
            csr,
            validity_duration: LIFETIME.as_secs().cast_signed(),
            metadata: Some(prost_types::Struct {
                fields: [("ImpersonatedIdentity".to_owned(), impersonated)].into(),
            }),
        };
        let mut service = self.service.clone();
        let answer = tokio::time::timeout(REQUEST_DEADLINE, service.create_certificate(request))
            .await
            .map_err(|_| IssueError::Timeout)?
            .map_err(|status| IssueError::Refused(status.message().to_owned()))?
            .into_inner();
        accept_answer(id, &answer.cert_chain, &key.serialize_pem())
    }
}

/// Takes the CA's answer only if it is what was asked for (F14).
fn accept_answer(id: &SpiffeId, elements: &[String], key: &str) -> Result<Credential, IssueError> {
    let (Some((roots, chain)), true) = (
        elements.split_last(),
        (2..=MAX_ELEMENTS).contains(&elements.len()),
    ) else {
        return Err(IssueError::Shape(elements.len()));
    };
    let svid = Svid::from_pem(&chain.concat(), key)?;
    if svid.id() != id {
        return Err(IssueError::OtherId {
            asked: id.clone(),
            got: svid.id().clone(),
        });
    }
    let now = SystemTime::now();
    // A minute's difference between clocks is tolerated; an SVID that has ended is not.
    if svid.not_before() > now + Duration::from_secs(60) || svid.not_after() <= now {
        return Err(IssueError::NotNow);
    }
    let trust_domain: TrustDomain = id.trust_domain().parse().map_err(SvidId)?;
    let bundles = TrustBundles::default().with_roots(&trust_domain, roots)?;
    svid.verify(&bundles)?;
    Ok(Credential {
        svid,
        bundles: Arc::new(bundles),
    })
}

/// A checked ID has a legal trust domain; should that ever fail, the answer is refused as no SVID.
struct SvidId(culvert_core::ids::IdError);

impl From<SvidId> for IssueError {
    fn from(SvidId(error): SvidId) -> Self {
        Self::Svid(SvidError::Leaf(error.into()))
    }
}

#[cfg(test)]
mod tests;
