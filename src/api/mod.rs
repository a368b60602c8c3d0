//! The Kubernetes API of this program: one kind, [`NodeImageBuild`](v1alpha1::NodeImageBuild). Plain data and its
//! validation rules; no client.

pub mod v1alpha1;
