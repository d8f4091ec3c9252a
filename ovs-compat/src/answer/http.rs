//! As much of HTTP as a scraper of metrics needs: one GET a connection.
//!
//! Source: RFC 9112 (2.2, 3, 9.6), RFC 9110 (9.3).

use crate::metrics::CONTENT_TYPE;

/// The longest head of a request.
const LONGEST: usize = 8 * 1024;

/// The answer to a request, once its head is there; None: there is more to come. Nothing else of it is
/// looked at: the connection ends with the answer.
pub fn answer(request: &[u8], metrics: impl FnOnce() -> String) -> Option<Vec<u8>> {
    if !is_complete(request) {
        return (request.len() > LONGEST).then(|| {
            let text = "The request is too long.\n";
            response("431 Request Header Fields Too Large", text, "", true)
        });
    }
    let line = request.split(|byte| *byte == b'\n').next();
    let line = std::str::from_utf8(line.unwrap_or_default()).unwrap_or_default();
    let mut words = line.trim_end_matches('\r').split(' ');
    let (method, target, version) = (words.next(), words.next(), words.next());
    let (Some(method), Some(target), Some(version), None) = (method, target, version, words.next())
    else {
        return Some(response("400 Bad Request", "This is no HTTP.\n", "", true));
    };
    if !version.starts_with("HTTP/1.") {
        let text = "HTTP/1.1 is spoken here.\n";
        return Some(response("505 HTTP Version Not Supported", text, "", true));
    }
    if !matches!(method, "GET" | "HEAD") {
        let allow = "Allow: GET, HEAD\r\n";
        let text = "GET is all there is.\n";
        return Some(response("405 Method Not Allowed", text, allow, true));
    }
    let with_body = method == "GET";
    let path = target.split('?').next().unwrap_or_default();
    Some(match path {
        "/metrics" => {
            let head = format!("Content-Type: {CONTENT_TYPE}\r\n");
            response("200 OK", &metrics(), &head, with_body)
        }
        _ => response(
            "404 Not Found",
            "The metrics are at /metrics.\n",
            "",
            with_body,
        ),
    })
}

fn is_complete(request: &[u8]) -> bool {
    let ends = |mark: &[u8]| request.windows(mark.len()).any(|window| window == mark);
    ends(b"\r\n\r\n") || ends(b"\n\n")
}

fn response(status: &str, body: &str, head: &str, with_body: bool) -> Vec<u8> {
    let head = match head.contains("Content-Type") {
        true => head.to_owned(),
        false => format!("{head}Content-Type: text/plain; charset=utf-8\r\n"),
    };
    let body_sent = if with_body { body } else { "" };
    format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{head}\r\n{body_sent}",
        body.len()
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(request: &str) -> Option<String> {
        let answer = answer(request.as_bytes(), || "a 1\n".to_owned());
        answer.map(|bytes| String::from_utf8(bytes).unwrap())
    }

    #[test]
    fn metrics_are_at_their_path() {
        let text = ask("GET /metrics?x=1 HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        assert!(
            text.starts_with("HTTP/1.1 200 OK\r\nContent-Length: 4\r\n"),
            "{text}"
        );
        assert!(
            text.contains("\r\nContent-Type: text/plain; version=0.0.4"),
            "{text}"
        );
        assert!(text.ends_with("\r\n\r\na 1\n"), "{text}");
        let text = ask("HEAD /metrics HTTP/1.0\r\n\r\n").unwrap();
        assert!(
            text.contains("Content-Length: 4\r\n") && text.ends_with("\r\n\r\n"),
            "{text}"
        );
    }

    #[test]
    fn half_a_request_is_waited_for_until_it_is_too_long() {
        assert_eq!(ask("GET /metrics HTTP/1.1\r\nHost: x\r\n"), None);
        assert_eq!(ask(""), None);
        assert!(ask(&"x".repeat(9000)).unwrap().starts_with("HTTP/1.1 431 "));
    }

    #[test]
    fn other_requests_get_an_error_that_says_why() {
        for (request, status) in [
            ("GET / HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("GET /metrics HTTP/2\r\n\r\n", "505"),
            ("GET /metrics\r\n\r\n", "400"),
            ("\r\n\r\n", "400"),
            ("a b c d\n\n", "400"),
        ] {
            let text = ask(request).unwrap();
            assert!(
                text.starts_with(&format!("HTTP/1.1 {status} ")),
                "{request:?}: {text}"
            );
        }
    }
}
