// Command vcsim is a vCenter for tests: govmomi's simulator, with what the real one is stricter about (leases that time
// out, uploads that are kept, privileges that are refused), machines that give their disks away, and faults on request. It prints its URL and serves until its
// standard input ends.
//
//	GET  /vcsim/inventory  everything that is there, read by govmomi's own client
//	GET  /vcsim/calls      how often each method was called
//	POST /vcsim/fault      {"method": "ImportVApp", "fault": "NoDiskSpace", "count": 1}
//	POST /vcsim/cut        {"after": 1000000, "times": 1}: breaks uploads after so many bytes
//	POST /vcsim/slow       {"bytesPerSecond": 100000}: takes uploads at this pace
//	POST /vcsim/away       {"requests": 3}: answers the next requests with 503
//	POST /vcsim/expire     ends all sessions
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/simulator"
	_ "github.com/vmware/govmomi/vapi/simulator"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

var (
	listen       = flag.String("listen", "127.0.0.1:0", "address to listen on")
	username     = flag.String("username", "builder@vsphere.local", "the only user")
	password     = flag.String("password", "vcsim-password", "the user's password")
	authority    = flag.String("authority", "", "write the certificate authority to this file (PEM)")
	disks        = flag.String("disks", "", "keep uploaded disks in this directory, named by lease and file")
	deny         = flag.String("deny", "", "privileges that the user lacks, separated by commas")
	free         = flag.Int64("free", -1, "bytes that are free in the datastores")
	leaseTimeout = flag.Int("lease-timeout", 300, "seconds after which an import without progress is undone")
)

func main() {
	log.SetFlags(0)
	flag.Parse()
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	model := simulator.VPX()
	model.Datacenter, model.Pool, model.Machine = 2, 1, 0
	defer model.Remove()
	if err := model.Create(); err != nil {
		return err
	}
	service := model.Service
	service.RegisterEndpoints = true
	service.Listen = &url.URL{Host: *listen, User: url.UserPassword(*username, *password)}
	config, err := serverTLS(*authority)
	if err != nil {
		return err
	}
	service.TLS = config
	registry := model.Map()
	if *deny != "" {
		manager := registry.Get(*model.ServiceContent.AuthorizationManager).(*simulator.AuthorizationManager)
		registry.Put(&authorization{manager})
	}
	for _, entity := range registry.All("Datastore") {
		datastore := entity.(*simulator.Datastore)
		if *free >= 0 {
			datastore.Summary.FreeSpace = *free
		}
	}
	server := service.NewServer()
	front := newFront(service, server.URL, server.Config.Handler)
	server.Config.Handler = front
	registry.Handler = front.handle
	if err := front.addFolders(); err != nil {
		return err
	}
	address := *server.URL
	address.User, address.Path = nil, ""
	fmt.Println(address.String())
	// Whoever started this is gone when the other end of the pipe is.
	_, _ = io.Copy(io.Discard, os.Stdin)
	return nil
}

// addFolders makes a folder for templates in the first datacenter.
func (f *front) addFolders() error {
	return f.withClient(func(ctx context.Context, client *vim25.Client) error {
		finder := find.NewFinder(client)
		datacenter, err := finder.Datacenter(ctx, "DC0")
		if err != nil {
			return err
		}
		folders, err := datacenter.Folders(ctx)
		if err != nil {
			return err
		}
		_, err = folders.VmFolder.CreateFolder(ctx, "templates")
		return err
	})
}

// authorization is an AuthorizationManager that refuses some privileges; the simulator's own grants everything.
type authorization struct {
	*simulator.AuthorizationManager
}

func (a *authorization) HasPrivilegeOnEntities(req *types.HasPrivilegeOnEntities) soap.HasFault {
	body := a.AuthorizationManager.HasPrivilegeOnEntities(req).(*methods.HasPrivilegeOnEntitiesBody)
	for _, entity := range body.Res.Returnval {
		for i := range entity.PrivAvailability {
			for _, denied := range strings.Split(*deny, ",") {
				if entity.PrivAvailability[i].PrivId == denied {
					entity.PrivAvailability[i].IsGranted = false
				}
			}
		}
	}
	return body
}

func leaseLimit() time.Duration { return time.Duration(*leaseTimeout) * time.Second }
