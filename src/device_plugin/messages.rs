//! The messages of kubelet's device plugin API, version `v1beta1` (`k8s.io/kubelet/pkg/apis/deviceplugin/v1beta1`): what
//! this plugin says or reads, with the API's field numbers. Protobuf passes over fields that are not listed, so what
//! Kubernetes adds does no harm.

/// Version of the API, as kubelet compares it.
pub const VERSION: &str = "v1beta1";
/// Kubelet's own socket in the directory of the plugins.
pub const KUBELET_SOCKET: &str = "kubelet.sock";
/// `Device.health` of a device that may be given to a container.
pub const HEALTHY: &str = "Healthy";
/// `Device.health` of one that is there and may not.
pub const UNHEALTHY: &str = "Unhealthy";

/// Method of the service `Registration`, which kubelet serves.
pub const REGISTER: &str = "/v1beta1.Registration/Register";
/// Methods of the service `DevicePlugin`, which plugins serve.
pub const OPTIONS: &str = "/v1beta1.DevicePlugin/GetDevicePluginOptions";
pub const LIST_AND_WATCH: &str = "/v1beta1.DevicePlugin/ListAndWatch";
pub const ALLOCATE: &str = "/v1beta1.DevicePlugin/Allocate";

#[derive(Clone, Copy, Eq, PartialEq, prost::Message)]
pub struct Empty {}

#[derive(Clone, Eq, PartialEq, prost::Message)]
pub struct RegisterRequest {
    #[prost(string, tag = "1")]
    pub version: String,
    /// Name of the plugin's socket, beside kubelet's.
    #[prost(string, tag = "2")]
    pub endpoint: String,
    #[prost(string, tag = "3")]
    pub resource_name: String,
    #[prost(message, optional, tag = "4")]
    pub options: Option<DevicePluginOptions>,
}

/// Which optional calls kubelet is to make.
#[derive(Clone, Copy, Eq, PartialEq, prost::Message)]
pub struct DevicePluginOptions {
    #[prost(bool, tag = "1")]
    pub pre_start_required: bool,
    #[prost(bool, tag = "2")]
    pub get_preferred_allocation_available: bool,
}

#[derive(Clone, Eq, PartialEq, prost::Message)]
pub struct ListAndWatchResponse {
    #[prost(message, repeated, tag = "1")]
    pub devices: Vec<Device>,
}

#[derive(Clone, Eq, PartialEq, prost::Message)]
pub struct Device {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, tag = "2")]
    pub health: String,
}

#[derive(Clone, Eq, PartialEq, prost::Message)]
pub struct AllocateRequest {
    #[prost(message, repeated, tag = "1")]
    pub container_requests: Vec<ContainerAllocateRequest>,
}

#[derive(Clone, Eq, PartialEq, prost::Message)]
pub struct ContainerAllocateRequest {
    #[prost(string, repeated, tag = "1")]
    pub devices_ids: Vec<String>,
}

#[derive(Clone, Eq, PartialEq, prost::Message)]
pub struct AllocateResponse {
    #[prost(message, repeated, tag = "1")]
    pub container_responses: Vec<ContainerAllocateResponse>,
}

/// What a container gets for its devices.
#[derive(Clone, Eq, PartialEq, prost::Message)]
pub struct ContainerAllocateResponse {
    #[prost(message, repeated, tag = "3")]
    pub devices: Vec<DeviceSpec>,
}

#[derive(Clone, Eq, PartialEq, prost::Message)]
pub struct DeviceSpec {
    #[prost(string, tag = "1")]
    pub container_path: String,
    #[prost(string, tag = "2")]
    pub host_path: String,
    /// Of `r`, `w` and `m` (making the device's node).
    #[prost(string, tag = "3")]
    pub permissions: String,
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;

    /// The bytes are those that the package of the API, in Go, writes.
    #[test]
    fn messages_are_those_of_the_api() {
        let options = DevicePluginOptions { pre_start_required: true, get_preferred_allocation_available: true };
        let register = RegisterRequest {
            version: VERSION.into(),
            endpoint: "a.sock".into(),
            resource_name: "b/kvm".into(),
            options: Some(options),
        };
        let expected = "0a07763162657461311206612e736f636b1a05622f6b766d220408011001";
        assert_eq!(hex::encode(register.encode_to_vec()), expected);

        let device = |id: &str, health: &str| Device { id: id.into(), health: health.into() };
        let list = ListAndWatchResponse { devices: vec![device("kvm-0", HEALTHY), device("kvm-1", UNHEALTHY)] };
        let expected = "0a100a056b766d2d3012074865616c7468790a120a056b766d2d311209556e6865616c746879";
        assert_eq!(hex::encode(list.encode_to_vec()), expected);

        let asked = ContainerAllocateRequest { devices_ids: vec!["kvm-0".into(), "kvm-1".into()] };
        let bytes = hex::decode("0a0e0a056b766d2d300a056b766d2d31").unwrap();
        assert_eq!(AllocateRequest::decode(&bytes[..]).unwrap().container_requests, [asked]);

        let device =
            DeviceSpec { container_path: "/dev/a".into(), host_path: "/dev/b".into(), permissions: "rw".into() };
        let allocated =
            AllocateResponse { container_responses: vec![ContainerAllocateResponse { devices: vec![device] }] };
        assert_eq!(hex::encode(allocated.encode_to_vec()), "0a161a140a062f6465762f6112062f6465762f621a027277");
    }
}
