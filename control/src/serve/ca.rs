//! The certificate service.

use super::{Shared, limits::Budget};
use crate::authority::SignError;
use culvert_core::ids::SpiffeId;
use culvert_proto::ca::{
    IstioCertificateRequest, IstioCertificateResponse,
    istio_certificate_service_server::IstioCertificateService,
};
use std::{sync::Arc, time::Duration};
use tonic::{Request, Response, Status, async_trait};

pub struct Ca(pub Arc<Shared>);

/// Why a certificate is not issued; for the audit log, never for the caller.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("no identity was asked for")]
    NothingAsked,
    #[error("no pod with this identity runs on the node")]
    NotOnNode,
    #[error(transparent)]
    Sign(#[from] SignError),
}

#[async_trait]
impl IstioCertificateService for Ca {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let node = self.0.tokens.node(&request)?;
        self.0.limits.spend(&node, Budget::Certificates, 1)?;
        let request = request.into_inner();
        let asked = impersonated(&request).unwrap_or_default();
        match self.issue(&node, &asked, &request) {
            Ok((cert_chain, serial)) => {
                self.count("issued");
                tracing::info!(target: "audit", node, id = asked, serial, "certificate issued");
                Ok(Response::new(IstioCertificateResponse { cert_chain }))
            }
            Err(reason) => {
                self.count(reason.word());
                tracing::warn!(target: "audit", node, id = %asked.escape_debug(), %reason, "certificate refused");
                Err(Status::unauthenticated("request not granted"))
            }
        }
    }
}

/// The identity that a request asks for.
fn impersonated(request: &IstioCertificateRequest) -> Option<String> {
    let value = request.metadata.as_ref()?.fields.get("ImpersonatedIdentity")?;
    match value.kind.as_ref()? {
        prost_types::value::Kind::StringValue(text) => Some(text.clone()),
        _ => None,
    }
}

impl Refusal {
    /// The metrics' word for it.
    fn word(&self) -> &'static str {
        match self {
            Self::NothingAsked => "nothing_asked",
            Self::NotOnNode => "not_on_node",
            Self::Sign(_) => "not_signed",
        }
    }
}

impl Ca {
    fn count(&self, verdict: &str) {
        let certificates = &self.0.metrics.certificates;
        certificates.with_label_values(&[verdict]).inc();
    }

    fn issue(
        &self,
        node: &str,
        asked: &str,
        request: &IstioCertificateRequest,
    ) -> Result<(Vec<String>, String), Refusal> {
        if asked.is_empty() {
            return Err(Refusal::NothingAsked);
        }
        let id = self.granted(node, asked).ok_or(Refusal::NotOnNode)?;
        let life = u64::try_from(request.validity_duration).unwrap_or_default();
        let life = Duration::from_secs(if life == 0 { u64::MAX } else { life });
        Ok(self.0.authority.load().sign(&id, &request.csr, life)?)
    }

    /// The asked identity, if a pod on the node has it, or a workload there that speaks HBONE itself: the
    /// set is computed from objects, and the asked text is compared with it and never parsed.
    fn granted(&self, node: &str, asked: &str) -> Option<SpiffeId> {
        let world = self.0.world.borrow();
        let pods = world.pods_on(node).filter(|pod| pod.enrolled);
        pods.map(|pod| &pod.identity)
            .chain(world.own_tunnels_on(node))
            .find(|identity| identity.as_str() == asked)
            .cloned()
    }
}

#[cfg(test)]
mod tests;
