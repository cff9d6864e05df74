//! Where to connect to: a host agent, or a fencer. What listens has an address of its own (`shootdown-server`).

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

/// An address to connect to: `tcp://host:port` (or `http://host:port`, or `host:port`), or `unix:/path`. A
/// name is resolved when somebody connects, each time.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Deserialize)]
#[serde(try_from = "String")]
pub enum Endpoint {
    /// A TCP port, in plaintext.
    Tcp {
        /// A name, an IPv4 address, or an IPv6 address without its brackets.
        host: String,
        /// The port.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

/// Why an endpoint was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// Not a scheme that anybody here listens on.
    #[error("`{given}` is not an endpoint; write tcp://HOST:PORT or unix:/PATH")]
    Scheme {
        /// What was given.
        given: String,
    },
    /// No host, or no port.
    #[error("`{given}` has no HOST:PORT; write for example tcp://127.0.0.1:7400, or unix:/PATH")]
    HostPort {
        /// What was given.
        given: String,
    },
    /// Not an absolute path.
    #[error("`{given}` has no absolute path; write for example unix:/run/shootdown/device.sock")]
    Path {
        /// What was given.
        given: String,
    },
}

impl Endpoint {
    /// As the gRPC library takes it.
    #[must_use]
    pub fn uri(&self) -> String {
        match self {
            Self::Unix(path) => format!("unix:{}", path.display()),
            Self::Tcp { host, port } if host.contains(':') => format!("http://[{host}]:{port}"),
            Self::Tcp { host, port } => format!("http://{host}:{port}"),
        }
    }

    /// Whether what is sent there can be read on no network: a Unix socket or a loopback address. A
    /// name other than `localhost` may resolve to anything, and is not.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp { host, .. } => {
                host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
            }
        }
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(given: &str) -> Result<Self, EndpointError> {
        if let Some(path) = given.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if !path.starts_with('/') {
                return Err(EndpointError::Path { given: given.to_owned() });
            }
            return Ok(Self::Unix(path.into()));
        }
        let authority =
            given.strip_prefix("tcp://").or_else(|| given.strip_prefix("http://")).unwrap_or(given);
        if authority.is_empty() || authority.contains("://") {
            return Err(EndpointError::Scheme { given: given.to_owned() });
        }
        let no_host_port = || EndpointError::HostPort { given: given.to_owned() };
        let (host, port) = authority.trim_end_matches('/').rsplit_once(':').ok_or_else(no_host_port)?;
        let in_brackets = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        // Without them an IPv6 address of which the end is missing, or the port, is one of another host.
        if in_brackets.is_none() && host.contains(':') {
            return Err(no_host_port());
        }
        let host = in_brackets.unwrap_or(host);
        if host.is_empty() || host.contains(['/', '@', '?', '#', ' ']) {
            return Err(no_host_port());
        }
        let port = port.parse().map_err(|_| no_host_port())?;
        Ok(Self::Tcp { host: host.to_owned(), port })
    }
}

impl TryFrom<String> for Endpoint {
    type Error = EndpointError;

    fn try_from(given: String) -> Result<Self, EndpointError> {
        given.parse()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "tcp://[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "tcp://{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_read_back_as_it_is_written() {
        for given in ["tcp://host-7:7400", "tcp://[::1]:7400", "unix:/run/shootdown/device.sock"] {
            assert_eq!(given.parse::<Endpoint>().unwrap().to_string(), given);
        }
        for given in ["http://a:1", "a:1"] {
            assert_eq!(given.parse::<Endpoint>().unwrap().to_string(), "tcp://a:1");
        }
        assert_eq!("unix:///a/b".parse::<Endpoint>().unwrap().to_string(), "unix:/a/b");
    }

    #[test]
    fn what_is_no_endpoint_is_refused() {
        for given in [
            "",
            "host",
            "https://h:1",
            "fd://n",
            "tcp://host",
            "tcp://:1",
            "h:99999",
            "::1",
            "unix:",
            "unix:a",
        ] {
            assert!(given.parse::<Endpoint>().is_err(), "{given}");
        }
    }

    #[test]
    fn the_grpc_library_takes_what_is_an_endpoint() {
        for (given, uri) in [
            ("tcp://host-7:7400", "http://host-7:7400"),
            ("[::1]:7400", "http://[::1]:7400"),
            ("unix:/a/b", "unix:/a/b"),
        ] {
            let endpoint: Endpoint = given.parse().unwrap();
            assert_eq!(endpoint.uri(), uri);
            assert!(tonic::transport::Endpoint::from_shared(endpoint.uri()).is_ok(), "{uri}");
        }
    }

    #[test]
    fn a_name_is_not_taken_for_local() {
        let local = |given: &str| given.parse::<Endpoint>().unwrap().is_local();
        assert!(
            local("unix:/a")
                && local("tcp://127.0.0.1:1")
                && local("tcp://[::1]:1")
                && local("tcp://localhost:1")
        );
        assert!(
            !local("tcp://localhost.example:1") && !local("tcp://10.0.0.1:1") && !local("tcp://0.0.0.0:1")
        );
    }
}
