//! SVIDs of the workloads on this node: fetched, renewed at half life, dropped with the last of them.
//!
//! ```text
//! acquire(id) ──▶ fetch task per identity ──CSR──▶ control's CA ──▶ Svid + TrustBundles ──watch──▶ tunnels
//!                 an older instance ──handover──▶──┘   lists from a file ──┘
//! ```
//! Invariant: a key is made here, for one identity, and leaves memory when the last workload of that
//! identity has left. What the CA answers is taken only if it is what was asked for; otherwise the SVID
//! in hand stays until it ends.

pub mod handover;

use crate::{
    control::{Control, ControlError, Credentials},
    tls::{BundleError, NewKey, RevocationLists, Svid, SvidError, TrustBundles, VerifyError},
};
use culvert_core::ids::{SpiffeId, TrustDomain};
use culvert_proto::ca::{
    IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient,
};
use parking_lot::Mutex;
use rcgen::{CertificateParams, SanType};
use rustls_pki_types::PrivateKeyDer;
use rustls_pki_types::{CertificateDer, pem::PemObject};
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
    /// The roots inside the bundles, as they came (PEM).
    roots: Arc<str>,
}

impl Credential {
    /// Takes an SVID and its roots only if it is for `id` and valid now.
    fn checked(id: &SpiffeId, svid: Svid, roots: &str, now: SystemTime) -> Result<Self, IssueError> {
        if svid.id() != id {
            return Err(IssueError::OtherId {
                asked: id.clone(),
                got: svid.id().clone(),
            });
        }
        if svid.not_before() > now + CLOCKS_DIFFER || svid.not_after() <= now {
            return Err(IssueError::NotNow);
        }
        let bundles = bundles(id, roots)?;
        svid.verify(&bundles)?;
        Ok(Self {
            bundles: Arc::new(bundles),
            svid,
            roots: roots.into(),
        })
    }

    /// The certificates of the roots inside the bundles.
    pub fn roots(&self) -> impl Iterator<Item = CertificateDer<'static>> {
        CertificateDer::pem_slice_iter(self.roots.as_bytes()).filter_map(Result::ok)
    }
}

fn bundles(id: &SpiffeId, roots: &str) -> Result<TrustBundles, IssueError> {
    let trust_domain: TrustDomain = id.trust_domain().parse().map_err(SvidId)?;
    Ok(TrustBundles::default().with_roots(&trust_domain, roots)?)
}

/// The difference between clocks that is tolerated when an SVID begins; one that has ended is not taken.
const CLOCKS_DIFFER: Duration = Duration::from_secs(60);

/// What a predecessor has given is kept so long for workloads that have not arrived yet.
const UNCLAIMED: Duration = Duration::from_secs(30);

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
    /// From a predecessor, until its workload arrives.
    handed: Mutex<HashMap<SpiffeId, Credential>>,
    lists: watch::Sender<Lists>,
    /// Tasks run here, whichever thread asks.
    runtime: tokio::runtime::Handle,
}

/// The revocation lists in force.
#[derive(Debug, Clone)]
enum Lists {
    /// No file is configured.
    None,
    /// A file is configured and has not been read yet: nobody is trusted.
    Awaited,
    Read(RevocationLists),
}

struct Entry {
    id: SpiffeId,
    lists: watch::Receiver<Lists>,
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
        if let Lists::Awaited = *self.0.lists.borrow() {
            return None;
        }
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
            handed: Mutex::default(),
            lists: watch::Sender::new(Lists::None),
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
            lists: self.0.lists.subscribe(),
            current: watch::Sender::new(None),
            task: Mutex::default(),
        });
        if let Some(handed) = self.0.handed.lock().remove(id) {
            self.0.publish(&entry, handed);
        }
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

    /// From now on a revocation list is demanded: until `set_lists` no SVID is given out.
    pub fn await_lists(&self) {
        self.0.lists.send_replace(Lists::Awaited);
    }

    /// Puts revocation lists in force, for tunnels to come; their owners judge what is open.
    pub fn set_lists(&self, lists: RevocationLists) {
        self.0.lists.send_replace(Lists::Read(lists));
        let held: Vec<_> = self.0.held.lock().values().filter_map(Weak::upgrade).collect();
        for entry in held {
            let current = entry.current.borrow().clone();
            if let Some(credential) = current {
                self.0.publish(&entry, credential);
            }
        }
    }

    /// Returns once no revocation list is awaited.
    pub async fn lists_read(&self) {
        // The sender lives as long as `self`.
        let _ = self
            .0
            .lists
            .subscribe()
            .wait_for(|lists| !matches!(lists, Lists::Awaited))
            .await;
    }

    pub fn are_lists_read(&self) -> bool {
        !matches!(*self.0.lists.borrow(), Lists::Awaited)
    }

    /// Takes what a predecessor has given: for a workload that waits, or one that will arrive soon.
    fn take_over(&self, credential: Credential) {
        let id = credential.svid.id();
        let entry = self.0.held.lock().get(id).and_then(Weak::upgrade);
        match entry {
            Some(entry) if entry.current.borrow().is_none() => self.0.publish(&entry, credential),
            Some(_) => {}
            None => _ = self.0.handed.lock().insert(id.clone(), credential),
        }
    }

    /// Lets go of what no workload has claimed.
    async fn forget_unclaimed(&self) {
        tokio::time::sleep(UNCLAIMED).await;
        self.0.handed.lock().clear();
    }
}

impl Store {
    /// Publishes an SVID with its roots and the lists in force.
    fn publish(&self, entry: &Entry, credential: Credential) {
        let Credential { svid, roots, .. } = credential;
        // They were read before.
        let Ok(mut bundles) = bundles(svid.id(), &roots) else {
            return;
        };
        if let Lists::Read(lists) = &*self.lists.borrow() {
            bundles = bundles.with_lists(lists);
        }
        entry.current.send_replace(Some(Credential {
            svid,
            bundles: Arc::new(bundles),
            roots,
        }));
    }
}

/// Fetches, then renews at half life, for as long as the entry lives.
async fn keep(store: Arc<Store>, entry: Weak<Entry>, id: SpiffeId) {
    let mut failures = 0u32;
    // Once the CA is back, no more than one renewal's time passes until it is asked again (F13).
    let mut longest = LONGEST_PAUSE;
    loop {
        let held = entry.upgrade().and_then(|entry| entry.current.borrow().clone());
        match held {
            // Of a predecessor, or just issued.
            Some(held) if failures == 0 => until_renewal(&held.svid).await,
            _ => {}
        }
        let issued = {
            let Ok(_permit) = store.in_flight.acquire().await else {
                return;
            };
            store.issuer.issue(&id).await
        };
        let Some(entry) = entry.upgrade() else { return };
        match issued {
            Ok(credential) => {
                store.issued.fetch_add(1, Ordering::Relaxed);
                failures = 0;
                longest = half_of_what_is_left(&credential.svid).min(LONGEST_PAUSE);
                tracing::info!(%id, serial = credential.svid.serial(), "SVID issued");
                store.publish(&entry, credential);
            }
            Err(error) => {
                store.failed.fetch_add(1, Ordering::Relaxed);
                failures = failures.saturating_add(1);
                let pause = Duration::from_millis(500)
                    .saturating_mul(1 << failures.saturating_sub(1).min(9))
                    .min(longest)
                    .mul_f64(rand::random_range(0.8..1.2));
                tracing::error!(%id, %error, retry_in = ?pause, "no SVID issued; keeping the one in hand");
                drop(entry);
                tokio::time::sleep(pause).await;
            }
        }
    }
}

fn half_of_what_is_left(svid: &Svid) -> Duration {
    let left = svid.not_after().duration_since(SystemTime::now());
    left.unwrap_or_default() / 2
}

/// Waits in steps, so that a suspended host or a clock that was set does not miss a renewal.
async fn until_renewal(svid: &Svid) {
    const STEP: Duration = Duration::from_secs(10);
    let spread = rand::random_range(0.9..1.1);
    let began = SystemTime::now();
    while let Some(left) = renews_in(
        svid.not_before(),
        svid.not_after(),
        began,
        SystemTime::now(),
        spread,
    ) {
        tokio::time::sleep(left.min(STEP)).await;
    }
}

/// How long until an SVID taken at `began` is renewed: at half of the life that it had then, spread so that
/// a node's identities do not renew together; at once when it is not valid by a clock that has been set.
fn renews_in(
    not_before: SystemTime,
    not_after: SystemTime,
    began: SystemTime,
    now: SystemTime,
    spread: f64,
) -> Option<Duration> {
    let life = not_after.duration_since(began).unwrap_or_default();
    let due = began + life.mul_f64(0.5 * spread);
    if not_before > now + CLOCKS_DIFFER {
        return None;
    }
    due.duration_since(now).ok().filter(|left| !left.is_zero())
}

struct Issuer {
    service: IstioCertificateServiceClient<InterceptedService<Channel, Credentials>>,
}

impl Issuer {
    async fn issue(&self, id: &SpiffeId) -> Result<Credential, IssueError> {
        let key = NewKey::generate()?;
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
        accept_answer(id, &answer.cert_chain, &key.der())
    }
}

/// Takes the CA's answer only if it is what was asked for (F14).
fn accept_answer(
    id: &SpiffeId,
    elements: &[String],
    key: &PrivateKeyDer<'_>,
) -> Result<Credential, IssueError> {
    let (Some((roots, chain)), true) = (
        elements.split_last(),
        (2..=MAX_ELEMENTS).contains(&elements.len()),
    ) else {
        return Err(IssueError::Shape(elements.len()));
    };
    let svid = Svid::from_chain(&chain.concat(), key)?;
    Credential::checked(id, svid, roots, SystemTime::now())
}

/// A checked ID has a legal trust domain; should that ever fail, the answer is refused as no SVID.
struct SvidId(culvert_core::ids::IdError);

impl From<SvidId> for IssueError {
    fn from(SvidId(error): SvidId) -> Self {
        Self::Svid(SvidError::Leaf(error.into()))
    }
}

#[cfg(test)]
mod lifecycle_tests;
#[cfg(test)]
mod tests;
