package main

import (
	"context"
	"net/url"
	"path"
	"sort"
	"strings"

	"github.com/vmware/govmomi/vapi/library"
	"github.com/vmware/govmomi/vapi/rest"
	"github.com/vmware/govmomi/vapi/tags"
	"github.com/vmware/govmomi/view"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

type inventory struct {
	Objects    []entry        `json:"objects"`
	Machines   []machine      `json:"machines"`
	Categories []category     `json:"categories"`
	Libraries  []contents     `json:"libraries"`
	Sessions   int            `json:"sessions"`
	Tokens     int            `json:"tokens"`
	Leases     int            `json:"leases"`
	Calls      map[string]int `json:"calls"`
}

type entry struct {
	Type string `json:"type"`
	Path string `json:"path"`
}

type machine struct {
	Path         string            `json:"path"`
	MoRef        string            `json:"moref"`
	InstanceUUID string            `json:"instanceUUID"`
	Template     bool              `json:"template"`
	Version      string            `json:"version"`
	Guest        string            `json:"guest"`
	Snapshots    []string          `json:"snapshots"`
	Tags         []string          `json:"tags"`
	DiskKB       []int64           `json:"diskKB"`
	Thin         bool              `json:"thin"`
	Controllers  []string          `json:"controllers"`
	Adapters     []string          `json:"adapters"`
	Networks     []string          `json:"networks"`
	Datastores   []string          `json:"datastores"`
	Properties   map[string]string `json:"properties"`
	Uploaded     map[string]int64  `json:"uploaded"`
}

type category struct {
	Name        string   `json:"name"`
	Cardinality string   `json:"cardinality"`
	Types       []string `json:"types"`
	Tags        []string `json:"tags"`
}

type contents struct {
	Name  string `json:"name"`
	Items []item `json:"items"`
}

type item struct {
	Name        string           `json:"name"`
	Type        string           `json:"type"`
	Description string           `json:"description"`
	Files       map[string]int64 `json:"files"`
}

func newSoapClient(address *url.URL) *soap.Client {
	client := soap.NewClient(address, true)
	client.UserAgent = ours
	return client
}

func (f *front) inventory() (*inventory, error) {
	result := &inventory{Calls: map[string]int{}}
	err := f.withClient(func(ctx context.Context, client *vim25.Client) error {
		sessions, own, err := otherSessions(ctx, client)
		if err != nil {
			return err
		}
		for _, session := range sessions {
			if session.Key != own && session.UserAgent != ours {
				result.Sessions++
			}
		}
		api := rest.NewClient(client)
		if err := api.Login(ctx, url.UserPassword(*username, *password)); err != nil {
			return err
		}
		defer func() { _ = api.Logout(ctx) }()
		if err := result.readMachines(ctx, client, tags.NewManager(api), f); err != nil {
			return err
		}
		if err := result.readCategories(ctx, tags.NewManager(api)); err != nil {
			return err
		}
		return result.readLibraries(ctx, library.NewManager(api))
	})
	f.mu.Lock()
	defer f.mu.Unlock()
	for name, count := range f.calls {
		result.Calls[name] = count
	}
	for _, held := range f.leases {
		if !held.over {
			result.Leases++
		}
	}
	for _, valid := range f.tokens {
		if valid {
			result.Tokens++
		}
	}
	return result, err
}

func (i *inventory) readMachines(ctx context.Context, client *vim25.Client, manager *tags.Manager, f *front) error {
	root := client.ServiceContent.RootFolder
	all, err := view.NewManager(client).CreateContainerView(ctx, root, nil, true)
	if err != nil {
		return err
	}
	defer func() { _ = all.Destroy(ctx) }()
	var entities []mo.ManagedEntity
	if err := all.Retrieve(ctx, []string{"ManagedEntity"}, []string{"name", "parent"}, &entities); err != nil {
		return err
	}
	// A network's name is a property of its own kind.
	var networks []mo.Network
	if err := all.Retrieve(ctx, []string{"Network"}, []string{"name"}, &networks); err != nil {
		return err
	}
	names, parents := map[types.ManagedObjectReference]string{}, map[types.ManagedObjectReference]types.ManagedObjectReference{}
	for _, entity := range entities {
		names[entity.Self] = entity.Name
		if entity.Parent != nil {
			parents[entity.Self] = *entity.Parent
		}
	}
	for _, network := range networks {
		names[network.Self] = network.Name
	}
	pathOf := func(ref types.ManagedObjectReference) string {
		result := ""
		for ref != root {
			result = path.Join("/", names[ref], result)
			parent, ok := parents[ref]
			if !ok {
				break
			}
			ref = parent
		}
		return result
	}
	for ref := range names {
		i.Objects = append(i.Objects, entry{ref.Type, pathOf(ref)})
	}
	sort.Slice(i.Objects, func(a, b int) bool { return i.Objects[a].Path < i.Objects[b].Path })

	var machines []mo.VirtualMachine
	err = all.Retrieve(ctx, []string{"VirtualMachine"}, []string{"config", "snapshot", "network", "datastore"}, &machines)
	if err != nil {
		return err
	}
	for _, vm := range machines {
		m := machine{
			Path: pathOf(vm.Self), MoRef: vm.Self.Value, InstanceUUID: vm.Config.InstanceUuid, Template: vm.Config.Template,
			Version: vm.Config.Version, Guest: vm.Config.GuestId, Properties: map[string]string{},
			Snapshots: []string{}, Tags: []string{}, Networks: []string{}, Datastores: []string{},
		}
		if vm.Snapshot != nil {
			for _, snapshot := range vm.Snapshot.RootSnapshotList {
				m.Snapshots = append(m.Snapshots, snapshot.Name)
			}
		}
		attached, err := manager.GetAttachedTags(ctx, vm.Self)
		if err != nil {
			return err
		}
		for _, tag := range attached {
			category, err := manager.GetCategory(ctx, tag.CategoryID)
			if err != nil {
				return err
			}
			m.Tags = append(m.Tags, category.Name+"/"+tag.Name)
		}
		sort.Strings(m.Tags)
		for _, device := range vm.Config.Hardware.Device {
			switch device := device.(type) {
			case *types.VirtualDisk:
				m.DiskKB = append(m.DiskKB, device.CapacityInKB)
				if backing, ok := device.Backing.(*types.VirtualDiskFlatVer2BackingInfo); ok {
					m.Thin = backing.ThinProvisioned != nil && *backing.ThinProvisioned
				}
			case *types.ParaVirtualSCSIController:
				m.Controllers = append(m.Controllers, "pvscsi")
			case *types.VirtualVmxnet3:
				m.Adapters = append(m.Adapters, "vmxnet3")
			}
		}
		for _, network := range vm.Network {
			m.Networks = append(m.Networks, pathOf(network))
		}
		for _, datastore := range vm.Datastore {
			m.Datastores = append(m.Datastores, pathOf(datastore))
		}
		if vm.Config.VAppConfig != nil {
			for _, property := range vm.Config.VAppConfig.GetVmConfigInfo().Property {
				m.Properties[property.Id] = property.DefaultValue
			}
		}
		f.mu.Lock()
		for _, held := range f.leases {
			if held.machine == vm.Self {
				m.Uploaded = held.uploaded
			}
		}
		f.mu.Unlock()
		i.Machines = append(i.Machines, m)
	}
	return nil
}

func (i *inventory) readCategories(ctx context.Context, manager *tags.Manager) error {
	categories, err := manager.GetCategories(ctx)
	if err != nil {
		return err
	}
	for _, found := range categories {
		c := category{Name: found.Name, Cardinality: found.Cardinality, Types: found.AssociableTypes, Tags: []string{}}
		all, err := manager.GetTagsForCategory(ctx, found.ID)
		if err != nil {
			return err
		}
		for _, tag := range all {
			c.Tags = append(c.Tags, tag.Name)
		}
		sort.Strings(c.Tags)
		i.Categories = append(i.Categories, c)
	}
	sort.Slice(i.Categories, func(a, b int) bool { return i.Categories[a].Name < i.Categories[b].Name })
	return nil
}

func (i *inventory) readLibraries(ctx context.Context, manager *library.Manager) error {
	libraries, err := manager.GetLibraries(ctx)
	if err != nil {
		return err
	}
	for _, found := range libraries {
		c := contents{Name: found.Name, Items: []item{}}
		items, err := manager.GetLibraryItems(ctx, found.ID)
		if err != nil {
			return err
		}
		for _, each := range items {
			entry := item{Name: each.Name, Type: each.Type, Files: map[string]int64{}}
			if each.Description != nil {
				entry.Description = strings.TrimSpace(*each.Description)
			}
			files, err := manager.ListLibraryItemFiles(ctx, each.ID)
			if err != nil {
				return err
			}
			for _, file := range files {
				if file.Size != nil {
					entry.Files[file.Name] = *file.Size
				}
			}
			c.Items = append(c.Items, entry)
		}
		i.Libraries = append(i.Libraries, c)
	}
	return nil
}
