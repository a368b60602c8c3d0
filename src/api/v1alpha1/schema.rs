//! Pieces of the schema that several fields share: strings with a CEL rule whose message says what to write.
//!
//! Every string and list has an upper bound, because the API server refuses a definition whose rules could cost too much.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use schemars::{Schema, SchemaGenerator, json_schema};

/// `max_length` bounds the rule's cost. It is wider than what the rule accepts, because a string that is longer is
/// refused without the rule's message.
fn checked(max_length: u32, rule: &str, message: &str) -> Schema {
    json_schema!({
        "type": "string",
        "maxLength": max_length,
        "x-kubernetes-validations": [{ "rule": rule, "message": message }],
    })
}

fn list(max_items: u32, items: &Schema) -> Schema {
    json_schema!({ "type": "array", "maxItems": max_items, "items": items })
}

/// Credentials in a URL would stand in the resource for everybody who may read it.
pub(super) fn http_url(_: &mut SchemaGenerator) -> Schema {
    checked(
        2048,
        r"isURL(self) && self.matches('^https?://[^/?#@\\s]+([/?#]\\S*)?$')",
        "write an http:// or https:// URL with a host and without user name and password; credentials go into a Secret",
    )
}

pub(super) fn sha256(_: &mut SchemaGenerator) -> Schema {
    checked(128, "self.matches('^[0-9a-f]{64}$')", "write the SHA-256 as 64 lower-case hexadecimal digits")
}

pub(super) fn sha512(_: &mut SchemaGenerator) -> Schema {
    checked(256, "self.matches('^[0-9a-f]{128}$')", "write the SHA-512 as 128 lower-case hexadecimal digits")
}

pub(super) fn release_channel(_: &mut SchemaGenerator) -> Schema {
    checked(
        256,
        "self.matches('^1-[0-9]{1,3}$')",
        "write the release channel with a dash, as EKS Anywhere does: 1-31 for Kubernetes 1.31",
    )
}

pub(super) fn eksa_release(_: &mut SchemaGenerator) -> Schema {
    checked(
        256,
        r"self.matches('^v[0-9]+\\.[0-9]+\\.[0-9]+([-+][0-9A-Za-z.+-]+)?$')",
        "write the EKS Anywhere version with its leading v, e.g. v0.26.1",
    )
}

/// Whole mebibytes, between what an image needs and what its partition table is tested with.
pub(super) fn disk_size(_: &mut SchemaGenerator) -> Schema {
    checked(
        256,
        "self.matches('^[1-9][0-9]{0,7}(Mi|Gi|Ti)$') && quantity(self).compareTo(quantity('4Gi')) >= 0 && \
         quantity(self).compareTo(quantity('2Ti')) <= 0",
        "write a whole number from 4Gi to 2Ti with the unit Mi, Gi or Ti, e.g. 20Gi",
    )
}

pub(super) fn timeout(_: &mut SchemaGenerator) -> Schema {
    checked(
        256,
        "self.matches('^([0-9]{1,4}h)?([0-9]{1,5}m)?([0-9]{1,6}s)?$') && self.size() > 0 && \
         duration(self) >= duration('5m') && duration(self) <= duration('24h')",
        "write a duration from 5m to 24h in hours, minutes and seconds, e.g. 2h or 1h30m",
    )
}

pub(super) fn object_name(_: &mut SchemaGenerator) -> Schema {
    checked(
        253,
        r"self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",
        "write the name of an object in the namespace of the NodeImageBuild: lower-case letters, digits, - and .",
    )
}

pub(super) fn data_key(_: &mut SchemaGenerator) -> Schema {
    checked(253, "self.matches('^[-._a-zA-Z0-9]+$')", "write a key of the object's data: letters, digits, -, _ and .")
}

/// A leading dash would be an option of the package manager.
pub(super) fn package_names(_: &mut SchemaGenerator) -> Schema {
    let name = checked(
        256,
        "self.matches('^[A-Za-z0-9][A-Za-z0-9+._:~*-]*(=[A-Za-z0-9+._:~*-]+)?$')",
        "write one package name an item, optionally with =version, e.g. jq or nginx=1.22.*",
    );
    let mut packages = list(256, &name);
    packages.insert("x-kubernetes-list-type".into(), "set".into());
    packages
}

pub(super) fn repository_name(_: &mut SchemaGenerator) -> Schema {
    checked(
        256,
        "self.matches('^[a-z0-9][a-z0-9_-]{0,62}$')",
        "write a file name without extension: lower-case letters, digits, - and _",
    )
}

pub(super) fn file_path(_: &mut SchemaGenerator) -> Schema {
    checked(
        1024,
        r"self.matches('^(/[^/\\x00-\\x1f]+)+$') && !self.split('/').exists(part, part == '.' || part == '..')",
        "write the absolute path of a file without . and .. parts, e.g. /etc/motd",
    )
}

pub(super) fn account(_: &mut SchemaGenerator) -> Schema {
    checked(
        256,
        "self.matches('^([a-z_][a-z0-9_-]{0,31}|[0-9]{1,9})$')",
        "write the name or number of an account that exists in the image, e.g. root or 1000",
    )
}

pub(super) fn file_mode(_: &mut SchemaGenerator) -> Schema {
    checked(
        256,
        "self.matches('^[0-7]{3,4}$')",
        "write the mode as three or four octal digits in quotes, e.g. \"0644\"",
    )
}

/// A host as people write it into a connection setting, with an optional port.
pub(super) fn host(_: &mut SchemaGenerator) -> Schema {
    checked(
        512,
        r"self.matches('^([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\\[[0-9a-fA-F:]+\\])(:[0-9]{1,5})?$')",
        "write a host name or address, optionally with :port, without https:// and without a path",
    )
}

/// A host whose port has a field of its own.
pub(super) fn host_without_port(_: &mut SchemaGenerator) -> Schema {
    checked(
        512,
        r"self.matches('^([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\\[[0-9a-fA-F:]+\\])$')",
        "write a host name or address without https://, port and path; the port has a field of its own",
    )
}

pub(super) fn thumbprint(_: &mut SchemaGenerator) -> Schema {
    checked(
        256,
        "self.matches('^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2})*$') && self.size() in [59, 95]",
        "write the certificate's SHA-256 (or SHA-1) digest as pairs of hexadecimal digits with colons between, e.g. A1:B2:...",
    )
}

/// A name of one inventory object: neither a path nor something that vCenter or Prism would have to escape.
pub(super) fn image_name(_: &mut SchemaGenerator) -> Schema {
    checked(
        256,
        "self.matches('^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$')",
        "write a name of at most 80 letters, digits, -, _ and ., e.g. ubuntu-2204-kube-1-31",
    )
}

pub(super) fn uuid(_: &mut SchemaGenerator) -> Schema {
    checked(
        256,
        "self.matches('^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$')",
        "write a UUID, e.g. 0005b6f1-8f43-4a8c-9d1f-000000000001",
    )
}

pub(super) fn bucket(_: &mut SchemaGenerator) -> Schema {
    checked(
        256,
        "self.matches('^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$')",
        "write a bucket name: 3 to 63 lower-case letters, digits, - and .",
    )
}

pub(super) fn key_prefix(_: &mut SchemaGenerator) -> Schema {
    checked(
        512,
        "self.matches('^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$')",
        "write the prefix without / at its ends, from letters, digits, -, _, . and /, e.g. images/production",
    )
}

pub(super) fn region(_: &mut SchemaGenerator) -> Schema {
    checked(256, "self.matches('^[a-z0-9-]{1,63}$')", "write a region, e.g. eu-central-1")
}

pub(super) fn schedule(_: &mut SchemaGenerator) -> Schema {
    checked(
        128,
        r"self.matches('^[0-9A-Za-z*/,?#-]+( [0-9A-Za-z*/,?#-]+){4}$') || self in ['@hourly', '@daily', '@weekly', '@monthly']",
        "write five cron fields (minute, hour, day of month, month, day of week), e.g. 0 3 * * 1, or @daily",
    )
}

pub(super) fn time_zone(_: &mut SchemaGenerator) -> Schema {
    checked(
        256,
        "self.matches('^[A-Za-z_]+([/+-][A-Za-z0-9_+-]+)*$')",
        "write a name of the time zone database, e.g. Europe/Berlin",
    )
}

/// A number of a resource, as in a Pod: `2`, `"500m"`, `8Gi`.
pub(super) fn quantities(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "maxProperties": 16,
        "additionalProperties": {
            "x-kubernetes-int-or-string": true,
            "maxLength": 256,
            "x-kubernetes-validations": [{
                "rule": "type(self) == int ? self >= 0 : isQuantity(self) && !quantity(self).isLessThan(quantity('0'))",
                "message": "write a quantity as in a Pod, e.g. 2, 500m or 8Gi",
            }],
        },
    })
}

pub(super) fn role_names(_: &mut SchemaGenerator) -> Schema {
    list(
        32,
        &checked(
            1024,
            r"self.matches('^[A-Za-z0-9_./][A-Za-z0-9_./-]*$')",
            "write the name of an Ansible role or its path in the builder image, one an item",
        ),
    )
}

/// Brings the schema that the derive macros make into the form of a definition written for Go types:
///
/// - No `nullable`: `null` is then refused, so that `has()` in a rule means that there is a value.
/// - No `null` among the values of an enum, which the macros add where a field is optional.
/// - Descriptions without the line breaks of the source, which `kubectl explain` would keep.
/// - No formats that the API server does not know (`uint32`), which it warns about.
pub(super) fn tidy(definition: &mut CustomResourceDefinition) {
    for version in &mut definition.spec.versions {
        if let Some(schema) = version.schema.as_mut().and_then(|schema| schema.open_api_v3_schema.as_mut()) {
            tidy_schema(schema);
        }
    }
}

fn tidy_schema(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    if let Some(values) = &mut schema.enum_ {
        values.retain(|value| !value.0.is_null());
    }
    if let Some(description) = &mut schema.description {
        let paragraphs = description.split("\n\n").map(|paragraph| paragraph.replace('\n', " "));
        *description = paragraphs.collect::<Vec<_>>().join("\n\n");
    }
    if schema.format.as_ref().is_some_and(|format| format.starts_with("uint")) {
        schema.format = None;
    }
    schema.properties.iter_mut().flat_map(|properties| properties.values_mut()).for_each(tidy_schema);
    match &mut schema.items {
        Some(JSONSchemaPropsOrArray::Schema(items)) => tidy_schema(items),
        Some(JSONSchemaPropsOrArray::Schemas(items)) => items.iter_mut().for_each(tidy_schema),
        None => {}
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &mut schema.additional_properties {
        tidy_schema(values);
    }
}
