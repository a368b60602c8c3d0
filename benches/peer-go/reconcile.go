package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/handler"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

const (
	fieldManager   = "peer"
	finalizer      = "nodeimagebuild.dev/cleanup"
	nameLabel      = "nodeimagebuild.dev/name"
	buildIDLabel   = "nodeimagebuild.dev/build-id"
	buildContainer = "build"
	// podsOfJob is the index of pods by the uid of their Job.
	podsOfJob = "job"
	// concurrency is that of the other operator.
	concurrency = 32
)

// Reconciler keeps every NodeImageBuild and its Job in step.
type Reconciler struct {
	client client.Client
	events events.EventRecorder
	job    batchv1.Job
	secret map[string]string
}

// report is what a build leaves in the termination message of its pod.
type report struct {
	Succeeded *outcome `json:"succeeded"`
}

type outcome struct {
	Image struct {
		Image
		URL        string `json:"url"`
		BaseDigest string `json:"baseDigest"`
	} `json:"image"`
	Verification string `json:"verification"`
}

func (r *Reconciler) register(manager ctrl.Manager) error {
	byJob := func(object client.Object) []string {
		if owner := metav1.GetControllerOf(object); owner != nil {
			return []string{string(owner.UID)}
		}
		return nil
	}
	if err := manager.GetFieldIndexer().IndexField(context.Background(), &corev1.Pod{}, podsOfJob, byJob); err != nil {
		return err
	}
	byLabel := func(_ context.Context, object client.Object) []reconcile.Request {
		name := types.NamespacedName{Namespace: object.GetNamespace(), Name: object.GetLabels()[nameLabel]}
		return []reconcile.Request{{NamespacedName: name}}
	}
	return ctrl.NewControllerManagedBy(manager).
		For(&NodeImageBuild{}).
		Owns(&batchv1.Job{}).
		Watches(&corev1.Pod{}, handler.EnqueueRequestsFromMapFunc(byLabel)).
		WithOptions(controller.Options{MaxConcurrentReconciles: concurrency}).
		Complete(r)
}

// Reconcile is one pass over one resource.
func (r *Reconciler) Reconcile(ctx context.Context, request ctrl.Request) (ctrl.Result, error) {
	var build NodeImageBuild
	if err := r.client.Get(ctx, request.NamespacedName, &build); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if !build.DeletionTimestamp.IsZero() {
		return ctrl.Result{}, r.setFinalizer(ctx, &build, controllerutil.RemoveFinalizer)
	}
	digest, err := digestOf(build.Spec)
	if err != nil {
		return ctrl.Result{}, err
	}
	if build.Status.CompletionTime != nil && build.Status.SpecDigest == digest {
		return ctrl.Result{}, nil
	}
	if !controllerutil.ContainsFinalizer(&build, finalizer) {
		if err := r.setFinalizer(ctx, &build, controllerutil.AddFinalizer); err != nil {
			return ctrl.Result{}, ignoreConflict(err)
		}
	}
	uidDigest := sha256.Sum256([]byte(string(build.UID) + digest))
	buildID := hex.EncodeToString(uidDigest[:])[:10]
	name := build.Name + "-" + buildID

	var job batchv1.Job
	switch err := r.client.Get(ctx, types.NamespacedName{Namespace: build.Namespace, Name: name}, &job); {
	case apierrors.IsNotFound(err):
		created, err := r.start(ctx, &build, name, buildID)
		if err != nil {
			return ctrl.Result{}, err
		}
		job = *created
	case err != nil:
		return ctrl.Result{}, err
	}

	status := build.Status.deepCopy()
	status.ObservedGeneration = build.Generation
	status.OS = build.Spec.OS.Name + " " + build.Spec.OS.Version
	status.Provider = "baremetal"
	status.BuildID, status.JobName = buildID, name
	status.SpecDigest, status.InputsDigest, status.RunDigest = digest, digest, digest
	if status.StartTime == nil {
		created := metav1.Now().Rfc3339Copy()
		status.StartTime = &created
	}
	status.Attempts = 1
	status.Release = &Release{"v0.26.1", 100, "kubernetes-1-31-eks-47", "v1.31.13"}
	if job.Status.CompletionTime == nil {
		message := fmt.Sprintf("the Job `%s` builds the image", name)
		judge(status, build.Generation, "Building", metav1.ConditionFalse, "Building", message)
		if err := r.write(ctx, &build, status); err != nil {
			return ctrl.Result{}, ignoreConflict(err)
		}
		if build.Status.Phase != "Building" {
			r.events.Eventf(&build, nil, corev1.EventTypeNormal, "BuildStarted", "Build", "%s", message)
		}
		return ctrl.Result{}, nil
	}
	outcome, err := r.report(ctx, &job)
	if err != nil {
		return ctrl.Result{}, err
	}
	if outcome == nil {
		// The pod is not in the cache yet; its watch reconciles again.
		return ctrl.Result{}, nil
	}
	image := outcome.Image.Image
	completed := *job.Status.CompletionTime
	status.Image, status.ImageURL, status.BaseDigest = &image, outcome.Image.URL, outcome.Image.BaseDigest
	status.Verification, status.CompletionTime = outcome.Verification, &completed
	status.History = []HistoryEntry{{
		BuildID: buildID, Result: "Succeeded", StartTime: status.StartTime, CompletionTime: &completed,
		ImageURL: outcome.Image.URL, ImageName: image.Name, SHA256: image.SHA256, Release: status.Release,
	}}
	message := "the image is published: " + outcome.Image.URL
	judge(status, build.Generation, "Ready", metav1.ConditionTrue, "ImagePublished", message)
	if err := r.write(ctx, &build, status); err != nil {
		return ctrl.Result{}, ignoreConflict(err)
	}
	r.events.Eventf(&build, nil, corev1.EventTypeNormal, "ImagePublished", "Build", "%s", message)
	return ctrl.Result{}, nil
}

// ignoreConflict is for writes that lost a race: the watch brings what won it.
func ignoreConflict(err error) error {
	if apierrors.IsConflict(err) {
		return nil
	}
	return err
}

func digestOf(spec Spec) (string, error) {
	text, err := json.Marshal(spec)
	if err != nil {
		return "", err
	}
	digest := sha256.Sum256(text)
	return hex.EncodeToString(digest[:]), nil
}

func (in *Status) deepCopy() *Status {
	out := new(Status)
	in.DeepCopyInto(out)
	return out
}

func (r *Reconciler) setFinalizer(
	ctx context.Context, build *NodeImageBuild, set func(client.Object, string) bool,
) error {
	before := build.DeepCopyObject().(*NodeImageBuild)
	if !set(build, finalizer) {
		return nil
	}
	patch := client.MergeFromWithOptions(before, client.MergeFromWithOptimisticLock{})
	return client.IgnoreNotFound(r.client.Patch(ctx, build, patch, client.FieldOwner(fieldManager)))
}

// start creates the Secret, then the Job.
func (r *Reconciler) start(ctx context.Context, build *NodeImageBuild, name, buildID string) (*batchv1.Job, error) {
	labels := maps.Clone(r.job.Labels)
	labels[nameLabel], labels[buildIDLabel] = build.Name, buildID
	metadata := metav1.ObjectMeta{Namespace: build.Namespace, Name: name, Labels: labels}
	immutable := true
	secret := &corev1.Secret{ObjectMeta: metadata, StringData: r.secret, Immutable: &immutable}
	job := r.job.DeepCopy()
	metadata.Annotations = job.Annotations
	job.ObjectMeta = metadata
	job.Spec.Template.Labels[nameLabel], job.Spec.Template.Labels[buildIDLabel] = build.Name, buildID
	for index := range job.Spec.Template.Spec.Volumes {
		if volume := job.Spec.Template.Spec.Volumes[index].Secret; volume != nil {
			volume.SecretName = name
		}
	}
	for _, object := range []client.Object{secret, job} {
		// The rights of the chart do not allow to block the owner's deletion.
		blocks := controllerutil.WithBlockOwnerDeletion(false)
		if err := controllerutil.SetControllerReference(build, object, r.client.Scheme(), blocks); err != nil {
			return nil, err
		}
		err := r.client.Create(ctx, object, client.FieldOwner(fieldManager))
		if client.IgnoreAlreadyExists(err) != nil {
			return nil, err
		}
	}
	return job, nil
}

// report reads the termination message of the Job's pod.
func (r *Reconciler) report(ctx context.Context, job *batchv1.Job) (*outcome, error) {
	var pods corev1.PodList
	ofJob := client.MatchingFields{podsOfJob: string(job.UID)}
	if err := r.client.List(ctx, &pods, client.InNamespace(job.Namespace), ofJob); err != nil {
		return nil, err
	}
	for _, pod := range pods.Items {
		for _, container := range pod.Status.ContainerStatuses {
			if container.Name != buildContainer || container.State.Terminated == nil {
				continue
			}
			var found report
			if err := json.Unmarshal([]byte(container.State.Terminated.Message), &found); err != nil {
				return nil, err
			}
			return found.Succeeded, nil
		}
	}
	return nil, nil
}

// judge sets phase and conditions with kstatus's meaning.
func judge(status *Status, generation int64, phase string, ready metav1.ConditionStatus, reason, message string) {
	status.Phase = phase
	set := func(kind string, value metav1.ConditionStatus) {
		meta.SetStatusCondition(&status.Conditions, metav1.Condition{
			Type: kind, Status: value, Reason: reason, Message: message, ObservedGeneration: generation,
		})
	}
	set("Ready", ready)
	if ready == metav1.ConditionTrue {
		meta.RemoveStatusCondition(&status.Conditions, "Reconciling")
	} else {
		set("Reconciling", metav1.ConditionTrue)
	}
}

// write applies the status unless it is there already, or somebody changed the resource in the meantime.
func (r *Reconciler) write(ctx context.Context, build *NodeImageBuild, status *Status) error {
	if equality.Semantic.DeepEqual(&build.Status, status) {
		return nil
	}
	fields, err := runtime.DefaultUnstructuredConverter.ToUnstructured(status)
	if err != nil {
		return err
	}
	object := &unstructured.Unstructured{Object: map[string]any{
		"metadata": map[string]any{
			"namespace": build.Namespace, "name": build.Name, "resourceVersion": build.ResourceVersion,
		},
		"status": fields,
	}}
	object.SetGroupVersionKind(groupVersion.WithKind("NodeImageBuild"))
	apply := client.ApplyConfigurationFromUnstructured(object)
	return r.client.Status().Apply(ctx, apply, client.FieldOwner(fieldManager), client.ForceOwnership)
}
