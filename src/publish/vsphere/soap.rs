//! SOAP as vCenter speaks it (vSphere Web Services API, `urn:vim25`): elements, envelopes, faults and the session cookie.

use std::{error::Error, sync::RwLock};

use quick_xml::{
    Writer,
    events::{BytesDecl, BytesEnd, BytesStart, BytesText, Event},
};
use reqwest::{Client, Response, StatusCode, header};
use url::Url;

use crate::contract::shorten;

const ENVELOPE: &str = "http://schemas.xmlsoap.org/soap/envelope/";
const VIM: &str = "urn:vim25";
const XSI: &str = "http://www.w3.org/2001/XMLSchema-instance";
const XSD: &str = "http://www.w3.org/2001/XMLSchema";
/// Elements in each other that are believed. vCenter's have some ten; each takes room on the stack.
const DEEPEST: usize = 100;

/// An XML element, without namespaces: the API has only one.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Element {
    pub(super) name: String,
    /// `xsi:type`: the type of the value, without a namespace unless it is XML Schema's (`xsd:string`).
    pub(super) kind: Option<String>,
    attributes: Vec<(String, String)>,
    pub(super) children: Vec<Element>,
    text: String,
}

impl Element {
    pub(super) fn new(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    pub(super) fn with(mut self, child: Self) -> Self {
        self.children.push(child);
        self
    }

    pub(super) fn with_all(mut self, children: impl IntoIterator<Item = Self>) -> Self {
        self.children.extend(children);
        self
    }

    /// `<name>text</name>`.
    pub(super) fn of_text(name: &str, text: impl Into<String>) -> Self {
        Self { text: text.into(), ..Self::new(name) }
    }

    /// Adds `<name>text</name>`.
    pub(super) fn with_text(self, name: &str, text: impl Into<String>) -> Self {
        self.with(Self::of_text(name, text))
    }

    /// Adds a reference to a managed object.
    pub(super) fn with_object(self, name: &str, object: &Moref) -> Self {
        let attributes = vec![("type".to_owned(), object.kind.clone())];
        self.with(Self { attributes, text: object.id.clone(), ..Self::new(name) })
    }

    /// Sets `xsi:type`.
    pub(super) fn of_kind(mut self, kind: &str) -> Self {
        self.kind = Some(kind.to_owned());
        self
    }

    /// The same under another name.
    pub(super) fn renamed(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// The first child of that name.
    pub(super) fn child(&self, name: &str) -> Option<&Self> {
        self.children.iter().find(|child| child.name == name)
    }

    pub(super) fn children_named<'e>(&'e self, name: &'e str) -> impl Iterator<Item = &'e Self> {
        self.children.iter().filter(move |child| child.name == name)
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// The text of the first child of that name.
    pub(super) fn text_of(&self, name: &str) -> Option<&str> {
        self.child(name).map(Self::text)
    }

    /// The managed object that this element refers to.
    pub(super) fn object(&self) -> Option<Moref> {
        let (_, kind) = self.attributes.iter().find(|(name, _)| name == "type")?;
        Some(Moref { kind: kind.clone(), id: self.text.clone() })
    }

    fn write(&self, writer: &mut Writer<Vec<u8>>) -> std::io::Result<()> {
        let mut start = BytesStart::new(self.name.as_str());
        for (name, value) in &self.attributes {
            start.push_attribute((name.as_str(), value.as_str()));
        }
        if let Some(kind) = &self.kind {
            start.push_attribute(("xsi:type", kind.as_str()));
        }
        writer.write_event(Event::Start(start))?;
        if !self.text.is_empty() {
            writer.write_event(Event::Text(BytesText::new(&self.text)))?;
        }
        self.children.iter().try_for_each(|child| child.write(writer))?;
        writer.write_event(Event::End(BytesEnd::new(self.name.as_str())))
    }

    /// `None` where elements are in each other deeper than any that are known.
    fn read(node: roxmltree::Node<'_, '_>, depth: usize) -> Option<Self> {
        if depth > DEEPEST {
            return None;
        }
        let kind = node.attribute((XSI, "type")).map(|kind| match kind.split_once(':') {
            Some((prefix, name)) if node.lookup_namespace_uri(Some(prefix)) == Some(XSD) => format!("xsd:{name}"),
            Some((_, name)) => name.to_owned(),
            None => kind.to_owned(),
        });
        let attributes = node.attributes().filter(|attribute| attribute.namespace().is_none());
        let elements = node.children().filter(roxmltree::Node::is_element);
        Some(Self {
            name: node.tag_name().name().to_owned(),
            kind,
            attributes: attributes
                .map(|attribute| (attribute.name().to_owned(), attribute.value().to_owned()))
                .collect(),
            children: elements.map(|child| Self::read(child, depth + 1)).collect::<Option<_>>()?,
            text: if node.children().any(|child| child.is_element()) {
                String::new()
            } else {
                node.text().unwrap_or_default().to_owned()
            },
        })
    }
}

/// A managed object reference.
#[derive(Clone, Debug, Eq, PartialEq, Hash, Ord, PartialOrd)]
pub(super) struct Moref {
    /// e.g. `VirtualMachine`.
    pub(super) kind: String,
    /// e.g. `vm-42`.
    pub(super) id: String,
}

/// What vCenter says where a call fails.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Fault {
    /// Type of the fault, e.g. `InvalidLogin`.
    pub(super) kind: String,
    pub(super) message: String,
}

impl Fault {
    /// From a `LocalizedMethodFault`, as tasks and leases have it.
    pub(super) fn localized(error: &Element) -> Self {
        let fault = error.child("fault");
        let kind = fault.and_then(|fault| fault.kind.clone()).unwrap_or_else(|| "unknown fault".to_owned());
        let message = error.text_of("localizedMessage").filter(|message| !message.is_empty());
        Self { message: Self::explain(message, fault), kind }
    }

    /// From the body of a SOAP fault.
    fn soap(fault: &Element) -> Self {
        let detail = fault.child("detail").and_then(|detail| detail.children.first());
        let kind = detail.map_or_else(
            || "unknown fault".to_owned(),
            |detail| detail.kind.clone().unwrap_or_else(|| detail.name.trim_end_matches("Fault").to_owned()),
        );
        let message = fault.text_of("faultstring").filter(|message| !message.is_empty());
        Self { message: Self::explain(message, detail), kind }
    }

    /// The message with the details that a person needs, such as the privilege that is missing.
    fn explain(message: Option<&str>, detail: Option<&Element>) -> String {
        let simple = detail.iter().flat_map(|detail| &detail.children);
        let facts = simple
            .filter(|child| child.children.is_empty() && !child.text.is_empty())
            .map(|child| format!("{}: {}", child.name, child.text));
        message.map(str::to_owned).into_iter().chain(facts).collect::<Vec<_>>().join(", ")
    }
}

/// Why a call has no result.
#[derive(Debug)]
pub(super) enum CallError {
    Fault(Fault),
    /// No answer. `sent` is false where vCenter can not have seen the call.
    Away {
        sent: bool,
        cause: Box<dyn Error + Send + Sync>,
    },
    /// Something else listens there.
    NotVcenter(String),
}

/// One vCenter's SOAP endpoint and the session there.
#[derive(Debug)]
pub(super) struct Endpoint {
    client: Client,
    url: Url,
    cookie: RwLock<Option<String>>,
}

impl Endpoint {
    pub(super) fn new(client: Client, url: Url) -> Self {
        Self { client, url, cookie: RwLock::new(None) }
    }

    /// Forgets the session: a login in one that is open is refused.
    pub(super) fn forget_session(&self) {
        self.set_cookie(None);
    }

    fn set_cookie(&self, cookie: Option<String>) {
        if let Ok(mut known) = self.cookie.write() {
            *known = cookie;
        }
    }

    /// Calls a method and gives the response element.
    pub(super) async fn call(&self, method: &Element) -> Result<Element, CallError> {
        let envelope = envelope(method).map_err(|error| CallError::NotVcenter(error.to_string()))?;
        let mut request = self
            .client
            .post(self.url.clone())
            .header(header::CONTENT_TYPE, "text/xml; charset=utf-8")
            // The version of vSphere 6.7, which everything later understands.
            .header("SOAPAction", "urn:vim25/6.7");
        if let Some(cookie) = self.cookie.read().ok().and_then(|cookie| cookie.clone()) {
            request = request.header(header::COOKIE, cookie);
        }
        let away =
            |error: reqwest::Error| CallError::Away { sent: !error.is_connect(), cause: error.without_url().into() };
        let response = request.body(envelope).send().await.map_err(away)?;
        let status = response.status();
        let cookie = session_cookie(&response);
        let text = response.text().await.map_err(away)?;
        if matches!(status, StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT) {
            return Err(CallError::Away { sent: false, cause: status.to_string().into() });
        }
        let strange = || CallError::NotVcenter(format!("{status}: {}", shorten(text.trim(), 200)));
        let answer = body(&text).ok_or_else(strange)?;
        if answer.name == "Fault" {
            return Err(CallError::Fault(Fault::soap(&answer)));
        }
        if !status.is_success() || answer.name != format!("{}Response", method.name) {
            return Err(strange());
        }
        if cookie.is_some() {
            self.set_cookie(cookie);
        }
        Ok(answer)
    }
}

fn session_cookie(response: &Response) -> Option<String> {
    let cookies = response.headers().get_all(header::SET_COOKIE);
    let mut pairs = cookies.iter().filter_map(|cookie| cookie.to_str().ok()?.split(';').next());
    pairs.find(|pair| pair.starts_with("vmware_soap_session=")).map(str::to_owned)
}

fn envelope(method: &Element) -> std::io::Result<Vec<u8>> {
    let mut writer = Writer::new(Vec::new());
    writer.write_event(Event::Decl(BytesDecl::new("1.0", Some("UTF-8"), None)))?;
    let mut start = BytesStart::new("soapenv:Envelope");
    for (name, value) in [("xmlns:soapenv", ENVELOPE), ("xmlns:xsi", XSI), ("xmlns:xsd", XSD)] {
        start.push_attribute((name, value));
    }
    writer.write_event(Event::Start(start))?;
    writer.write_event(Event::Start(BytesStart::new("soapenv:Body")))?;
    let mut method = method.clone();
    method.attributes.push(("xmlns".to_owned(), VIM.to_owned()));
    method.write(&mut writer)?;
    writer.write_event(Event::End(BytesEnd::new("soapenv:Body")))?;
    writer.write_event(Event::End(BytesEnd::new("soapenv:Envelope")))?;
    Ok(writer.into_inner())
}

/// What is in the body of an envelope.
fn body(text: &str) -> Option<Element> {
    let document = roxmltree::Document::parse(text).ok()?;
    let body = document.root_element().children().find(|node| node.has_tag_name((ENVELOPE, "Body")))?;
    Element::read(body.children().find(roxmltree::Node::is_element)?, 0)
}

/// What was read can be sent back.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz(bytes: &[u8]) {
    let Some(element) = str::from_utf8(bytes).ok().and_then(body) else { return };
    let _ = (Fault::soap(&element), Fault::localized(&element), element.object());
    let sent = envelope(&element).ok().and_then(|envelope| body(str::from_utf8(&envelope).ok()?));
    let same = |sent: Element| sent.name == element.name && sent.children.len() == element.children.len();
    assert!(sent.is_some_and(same), "{element:?}");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn elements() -> impl Strategy<Value = Element> {
        let name = "[a-zA-Z][a-zA-Z0-9]{0,8}";
        let text = proptest::string::string_regex("[ -~äöü\n]{0,20}").unwrap();
        let leaf = (name, text, proptest::option::of("(xsd:)?[a-zA-Z]{1,8}"), proptest::option::of("[a-zA-Z]{1,8}"))
            .prop_map(|(name, text, kind, object)| Element {
                kind,
                attributes: object.into_iter().map(|kind| ("type".to_owned(), kind)).collect(),
                text,
                ..Element::new(&name)
            });
        leaf.prop_recursive(4, 24, 4, move |inner| {
            (name, prop::collection::vec(inner, 1..4))
                .prop_map(|(name, children)| Element::new(&name).with_all(children))
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(element in elements()) {
            let text = String::from_utf8(envelope(&element).unwrap()).unwrap();
            prop_assert_eq!(body(&text), Some(element));
        }

        #[test]
        fn garbage_is_no_body(text in ".{0,200}") {
            prop_assert_eq!(body(&text), None);
        }
    }

    #[test]
    fn elements_in_each_other_without_end_are_no_body() {
        let nested = |depth: usize| {
            let (open, close) = ("<a>".repeat(depth), "</a>".repeat(depth));
            body(&format!("<Envelope xmlns=\"{ENVELOPE}\"><Body>{open}{close}</Body></Envelope>"))
        };
        assert!(nested(DEEPEST).is_some());
        assert_eq!(nested(200_000), None);
    }

    #[test]
    fn reads_types_whatever_the_prefixes_are() {
        let text = r#"<e:Envelope xmlns:e="http://schemas.xmlsoap.org/soap/envelope/"><e:Body>
            <r xmlns="urn:vim25" xmlns:i="http://www.w3.org/2001/XMLSchema-instance"
               xmlns:s="http://www.w3.org/2001/XMLSchema" xmlns:v="urn:vim25">
            <a i:type="s:string">x</a><b i:type="v:VirtualDisk" type="Folder">group-1</b></r></e:Body></e:Envelope>"#;
        let element = body(text).unwrap();
        assert_eq!(element.child("a").unwrap().kind.as_deref(), Some("xsd:string"));
        let b = element.child("b").unwrap();
        assert_eq!(b.kind.as_deref(), Some("VirtualDisk"));
        assert_eq!(b.object(), Some(Moref { kind: "Folder".into(), id: "group-1".into() }));
    }

    #[test]
    fn faults_tell_type_and_details() {
        let text = r#"<soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/"
            xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body><soapenv:Fault>
            <faultcode>ServerFaultCode</faultcode><faultstring>Permission to perform this operation was denied.</faultstring>
            <detail><NoPermissionFault xmlns="urn:vim25" xsi:type="NoPermission"><object type="Folder">group-v3</object>
            <privilegeId>VApp.Import</privilegeId></NoPermissionFault></detail>
            </soapenv:Fault></soapenv:Body></soapenv:Envelope>"#;
        let fault = Fault::soap(&body(text).unwrap());
        assert_eq!(fault.kind, "NoPermission");
        let message = "Permission to perform this operation was denied., object: group-v3, privilegeId: VApp.Import";
        assert_eq!(fault.message, message);
    }
}
