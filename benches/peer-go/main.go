// An operator for NodeImageBuilds on controller-runtime, for benches/operator-scale only: the same transitions as the
// project's own, on informer caches as controller-runtime sets them up. It makes Jobs and Secrets from templates, so that
// they are as large, and reads no release documents.
package main

import (
	"encoding/json"
	"flag"
	"net/http"
	"os"
	"path/filepath"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/selection"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/cache"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/log/zap"
	"sigs.k8s.io/controller-runtime/pkg/metrics/server"
)

func main() {
	templates := flag.String("templates", "", "directory with job.json and secret.json")
	leaseNamespace := flag.String("lease-namespace", "", "namespace of the Lease")
	leaseName := flag.String("lease-name", "", "name of the Lease")
	admin := flag.String("admin-address", "", "where /readyz is served")
	flag.Parse()
	ctrl.SetLogger(zap.New())
	if err := run(*templates, *leaseNamespace, *leaseName, *admin); err != nil {
		ctrl.Log.Error(err, "ended")
		os.Exit(1)
	}
}

func run(templates, leaseNamespace, leaseName, admin string) error {
	reconciler := &Reconciler{}
	if err := read(filepath.Join(templates, "job.json"), &reconciler.job); err != nil {
		return err
	}
	if err := read(filepath.Join(templates, "secret.json"), &reconciler.secret); err != nil {
		return err
	}
	scheme := runtime.NewScheme()
	if err := clientgoscheme.AddToScheme(scheme); err != nil {
		return err
	}
	if err := addToScheme(scheme); err != nil {
		return err
	}
	ofBuilds, err := labels.NewRequirement(nameLabel, selection.Exists, nil)
	if err != nil {
		return err
	}
	selector := labels.NewSelector().Add(*ofBuilds)
	// The times of the other operator's lease.
	duration, deadline, retry := 15*time.Second, 10*time.Second, 2*time.Second
	manager, err := ctrl.NewManager(ctrl.GetConfigOrDie(), ctrl.Options{
		Scheme:                        scheme,
		Metrics:                       server.Options{BindAddress: "0"},
		HealthProbeBindAddress:        admin,
		LeaderElection:                true,
		LeaderElectionNamespace:       leaseNamespace,
		LeaderElectionID:              leaseName,
		LeaderElectionReleaseOnCancel: true,
		LeaseDuration:                 &duration,
		RenewDeadline:                 &deadline,
		RetryPeriod:                   &retry,
		Cache: cache.Options{ByObject: map[client.Object]cache.ByObject{
			&batchv1.Job{}: {Label: selector},
			&corev1.Pod{}:  {Label: selector},
		}},
	})
	if err != nil {
		return err
	}
	reconciler.client = manager.GetClient()
	reconciler.events = manager.GetEventRecorder(fieldManager)
	if err := reconciler.register(manager); err != nil {
		return err
	}
	synced := func(request *http.Request) error {
		if !manager.GetCache().WaitForCacheSync(request.Context()) {
			return request.Context().Err()
		}
		return nil
	}
	if err := manager.AddReadyzCheck("caches", synced); err != nil {
		return err
	}
	return manager.Start(ctrl.SetupSignalHandler())
}

func read(path string, into any) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, into)
}
