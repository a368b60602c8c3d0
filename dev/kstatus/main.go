// Command kstatus reads a Kubernetes object as JSON and prints what kstatus makes of it: the library by which Flux and
// kubectl-like tools judge the health of objects that they know nothing about.
package main

import (
	"fmt"
	"io"
	"os"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "kstatus:", err)
		os.Exit(1)
	}
}

func run() error {
	text, err := io.ReadAll(os.Stdin)
	if err != nil {
		return fmt.Errorf("can not read standard input: %w", err)
	}
	object := &unstructured.Unstructured{}
	if err := object.UnmarshalJSON(text); err != nil {
		return fmt.Errorf("that is no object: %w", err)
	}
	result, err := status.Compute(object)
	if err != nil {
		return fmt.Errorf("can not compute its status: %w", err)
	}
	fmt.Println(result.Status)
	return nil
}
