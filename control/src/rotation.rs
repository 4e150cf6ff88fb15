//! The CA's files, read again when they change; this server's certificate, made again before it ends.
//!
//! ```text
//! --ca-cert, --ca-key, --ca-root ──changed──▶ read, checked as a whole ──▶ Authority, root.pem, own certificate
//! ```
//! Invariant: a set of files that does not hold together changes nothing. Roots rotate in three steps: the new
//! one added, issuing switched to it, the old one removed, each after a life of an SVID.

use crate::{
    authority::{self, Authority},
    config::Config,
    serve::{Certificate, Shared},
};
use anyhow::Context;
use std::{fs, net::IpAddr, os::unix::fs::MetadataExt, path::PathBuf, sync::Arc, time::Duration};
use tokio::time::Instant;
use zeroize::Zeroizing;

/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How often this server's certificate is made anew; it lives for thirty days.
const OWN_EVERY: Duration = Duration::from_secs(24 * 3600);

/// Chain, key and roots.
pub type Files = [PathBuf; 3];

/// The files that were given, if any.
pub fn files(config: &Config) -> Option<Files> {
    Some([
        config.ca_cert.clone()?,
        config.ca_key.clone()?,
        config.ca_root.clone()?,
    ])
}

/// Reads a set of files and checks that it holds together.
pub fn read([cert, key, root]: &Files, config: &Config) -> anyhow::Result<Authority> {
    let text = |path: &PathBuf| {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        anyhow::Ok(Zeroizing::new(text))
    };
    let authority = Authority::from_pem(&text(cert)?, &text(key)?, &text(root)?, config.svid_ttl)?;
    authority.check(&config.trust_domain)?;
    Ok(authority)
}

/// Follows the files for as long as the server runs.
pub struct Rotation {
    pub config: Config,
    pub shared: Arc<Shared>,
    pub certificate: Arc<Certificate>,
    pub addresses: Vec<IpAddr>,
}

impl Rotation {
    pub async fn run(self) {
        let files = files(&self.config);
        let mut stamp = files.as_ref().map(stamps);
        let mut own_made = Instant::now();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let mut renew = own_made.elapsed() >= OWN_EVERY;
            if let Some(files) = &files {
                let now = stamps(files);
                if stamp.as_ref() != Some(&now) {
                    match self.take(files) {
                        Ok(()) => {
                            stamp = Some(now);
                            renew = true;
                        }
                        // Half of the files may be new; they are looked at again.
                        Err(error) => {
                            tracing::error!(
                                error = format!("{error:#}"),
                                "the CA's files are not taken; the last ones stay"
                            );
                        }
                    }
                }
            }
            if renew {
                let authority = self.shared.authority.load();
                let name = &self.config.server_name;
                match self.certificate.replace(&authority, name, &self.addresses) {
                    Ok(()) => own_made = Instant::now(),
                    Err(error) => {
                        tracing::error!(
                            error = format!("{error:#}"),
                            "this server's certificate cannot be renewed"
                        );
                    }
                }
            }
        }
    }

    fn take(&self, files: &Files) -> anyhow::Result<()> {
        let authority = read(files, &self.config)?;
        authority::write_public(&self.config.state_dir.join("root.pem"), authority.roots())?;
        self.shared.authority.store(Arc::new(authority));
        tracing::info!(target: "audit", "the CA's files have changed; issuing from the new ones");
        Ok(())
    }
}

fn stamps(files: &Files) -> [Option<(i64, i64, u64, u64)>; 3] {
    files.each_ref().map(|file| {
        let about = fs::metadata(file).ok()?;
        Some((about.mtime(), about.mtime_nsec(), about.len(), about.ino()))
    })
}
