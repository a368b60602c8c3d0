package main

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

var groupVersion = schema.GroupVersion{Group: "nodeimagebuild.dev", Version: "v1alpha1"}

// NodeImageBuild has the fields that the benchmark's resources have.
type NodeImageBuild struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              Spec   `json:"spec"`
	Status            Status `json:"status,omitempty"`
}

type Spec struct {
	OS             OS         `json:"os"`
	ReleaseChannel string     `json:"releaseChannel"`
	Baremetal      *Baremetal `json:"baremetal,omitempty"`
	Source         *Source    `json:"source,omitempty"`
}

type OS struct {
	Name    string `json:"name"`
	Version string `json:"version"`
}

type Baremetal struct{}

type Source struct {
	ReleaseManifestURL string `json:"releaseManifestURL,omitempty"`
	EksaBaseURL        string `json:"eksaBaseURL,omitempty"`
	EksdBaseURL        string `json:"eksdBaseURL,omitempty"`
}

type Status struct {
	ObservedGeneration int64              `json:"observedGeneration,omitempty"`
	Phase              string             `json:"phase,omitempty"`
	Conditions         []metav1.Condition `json:"conditions,omitempty"`
	OS                 string             `json:"os,omitempty"`
	Provider           string             `json:"provider,omitempty"`
	ImageURL           string             `json:"imageURL,omitempty"`
	Image              *Image             `json:"image,omitempty"`
	Release            *Release           `json:"release,omitempty"`
	BaseDigest         string             `json:"baseDigest,omitempty"`
	JobName            string             `json:"jobName,omitempty"`
	BuildID            string             `json:"buildID,omitempty"`
	InputsDigest       string             `json:"inputsDigest,omitempty"`
	SpecDigest         string             `json:"specDigest,omitempty"`
	RunDigest          string             `json:"runDigest,omitempty"`
	Attempts           int32              `json:"attempts,omitempty"`
	StartTime          *metav1.Time       `json:"startTime,omitempty"`
	CompletionTime     *metav1.Time       `json:"completionTime,omitempty"`
	Verification       string             `json:"verification,omitempty"`
	History            []HistoryEntry     `json:"history,omitempty"`
}

type Image struct {
	Name        string `json:"name"`
	Format      string `json:"format"`
	Size        int64  `json:"size"`
	VirtualSize int64  `json:"virtualSize"`
	SHA256      string `json:"sha256"`
}

type Release struct {
	EksaRelease       string `json:"eksaRelease"`
	BundleNumber      int64  `json:"bundleNumber"`
	EksdRelease       string `json:"eksdRelease"`
	KubernetesVersion string `json:"kubernetesVersion"`
}

type HistoryEntry struct {
	BuildID        string       `json:"buildID"`
	Result         string       `json:"result"`
	StartTime      *metav1.Time `json:"startTime,omitempty"`
	CompletionTime *metav1.Time `json:"completionTime,omitempty"`
	ImageURL       string       `json:"imageURL,omitempty"`
	ImageName      string       `json:"imageName,omitempty"`
	SHA256         string       `json:"sha256,omitempty"`
	Release        *Release     `json:"release,omitempty"`
}

type NodeImageBuildList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []NodeImageBuild `json:"items"`
}

func addToScheme(scheme *runtime.Scheme) error {
	scheme.AddKnownTypes(groupVersion, &NodeImageBuild{}, &NodeImageBuildList{})
	metav1.AddToGroupVersion(scheme, groupVersion)
	return nil
}

func copyOf[T any](value *T) *T {
	if value == nil {
		return nil
	}
	other := *value
	return &other
}

func (in *Status) DeepCopyInto(out *Status) {
	*out = *in
	out.Conditions = nil
	for _, condition := range in.Conditions {
		out.Conditions = append(out.Conditions, *condition.DeepCopy())
	}
	out.Image, out.Release = copyOf(in.Image), copyOf(in.Release)
	out.StartTime, out.CompletionTime = in.StartTime.DeepCopy(), in.CompletionTime.DeepCopy()
	out.History = nil
	for _, entry := range in.History {
		entry.StartTime, entry.CompletionTime = entry.StartTime.DeepCopy(), entry.CompletionTime.DeepCopy()
		entry.Release = copyOf(entry.Release)
		out.History = append(out.History, entry)
	}
}

func (in *NodeImageBuild) DeepCopyInto(out *NodeImageBuild) {
	*out = *in
	in.ObjectMeta.DeepCopyInto(&out.ObjectMeta)
	out.Spec.Baremetal, out.Spec.Source = copyOf(in.Spec.Baremetal), copyOf(in.Spec.Source)
	in.Status.DeepCopyInto(&out.Status)
}

func (in *NodeImageBuild) DeepCopyObject() runtime.Object {
	out := new(NodeImageBuild)
	in.DeepCopyInto(out)
	return out
}

func (in *NodeImageBuildList) DeepCopyObject() runtime.Object {
	out := &NodeImageBuildList{TypeMeta: in.TypeMeta}
	in.ListMeta.DeepCopyInto(&out.ListMeta)
	for index := range in.Items {
		var item NodeImageBuild
		in.Items[index].DeepCopyInto(&item)
		out.Items = append(out.Items, item)
	}
	return out
}
