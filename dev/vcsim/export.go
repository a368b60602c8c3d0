package main

import (
	"net/url"
	"path/filepath"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// handle is asked before each call, and does what the simulator does not know: machines tell how they have their address, and give their disks away. A clone has the disk of what it was
// cloned from, because nothing runs in it that could write.
func (f *front) handle(ctx *simulator.Context, method *simulator.Method) (mo.Reference, types.BaseMethodFault) {
	switch target := ctx.Map.Get(method.This).(type) {
	case *simulator.VirtualMachine:
		switch body := method.Body.(type) {
		case *types.CloneVM_Task:
			f.mu.Lock()
			f.clones[body.Name] = target.Self.Value
			f.mu.Unlock()
		case *types.PowerOnVM_Task:
			ctx.WithLock(target, func() { tellAddress(target) })
		case *types.ExportVm:
			ctx.Session.Registry.Put(&exporting{target, f})
		}
	case *simulator.OvfManager:
		if method.Name == "CreateDescriptor" {
			ctx.Session.Registry.Put(&describing{target})
		}
	}
	return nil, nil
}

// tellAddress completes what the guest of a machine says about its network, where an address was given to it
// ("SET.guest.ipAddress" among its extra configuration).
func tellAddress(machine *simulator.VirtualMachine) {
	cards := object.VirtualDeviceList(machine.Config.Hardware.Device).SelectByType((*types.VirtualEthernetCard)(nil))
	for i := range machine.Guest.Net {
		nic := &machine.Guest.Net[i]
		if len(nic.IpAddress) == 0 || i >= len(cards) {
			continue
		}
		nic.MacAddress = cards[i].(types.BaseVirtualEthernetCard).GetVirtualEthernetCard().MacAddress
		nic.IpConfig = &types.NetIpConfigInfo{}
		for _, address := range nic.IpAddress {
			known := types.NetIpConfigInfoIpAddress{IpAddress: address, PrefixLength: 8, State: "preferred"}
			nic.IpConfig.IpAddress = append(nic.IpConfig.IpAddress, known)
		}
	}
}

// exporting is a machine whose disk can be fetched. It is what the session sees for this one call.
type exporting struct {
	*simulator.VirtualMachine
	front *front
}

// ExportVm gives a lease for the disk.
func (e *exporting) ExportVm(ctx *simulator.Context, _ *types.ExportVm) soap.HasFault {
	ctx.Session.Registry.Remove(ctx, e.Self)
	body := new(methods.ExportVmBody)
	if e.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOff {
		body.Fault_ = simulator.Fault("", &types.InvalidPowerState{ExistingState: e.Runtime.PowerState})
		return body
	}
	f := e.front
	f.mu.Lock()
	defer f.mu.Unlock()
	source := e.Self.Value
	if from, ok := f.clones[e.Name]; ok {
		source = from
	}
	found, _ := filepath.Glob(filepath.Join(*disks, source+"-*"))
	if *disks == "" || len(found) != 1 {
		body.Fault_ = simulator.Fault("the machine has no disk that was uploaded", new(types.NotSupported))
		return body
	}
	lease := &simulator.HttpNfcLease{HttpNfcLease: mo.HttpNfcLease{State: types.HttpNfcLeaseStateReady}}
	ctx.Session.Put(lease)
	id := lease.Self.Value
	f.exports[id] = found[0]
	address := *f.url
	address.User, address.Path = nil, "/nfc/"+id+"/disk-0.vmdk"
	lease.Info = &types.HttpNfcLeaseInfo{
		Lease: lease.Self, Entity: e.Self, LeaseTimeout: 300,
		DeviceUrl: []types.HttpNfcLeaseDeviceUrl{{
			Key: "/" + e.Self.Value + "/VirtualDisk2000:0", ImportKey: "/" + e.Self.Value + "/VirtualDisk2000:0",
			Url:      (&url.URL{Scheme: address.Scheme, Host: address.Host, Path: address.Path}).String(),
			TargetId: "disk-0.vmdk", Disk: types.NewBool(true),
		}},
	}
	body.Res = &types.ExportVmResponse{Returnval: lease.Self}
	return body
}

// describing is an OvfManager that describes machines, for one call as well.
type describing struct {
	*simulator.OvfManager
}

// CreateDescriptor describes nothing of the machine: nobody reads it.
func (d *describing) CreateDescriptor(ctx *simulator.Context, _ *types.CreateDescriptor) soap.HasFault {
	ctx.Session.Registry.Remove(ctx, d.Self)
	return &methods.CreateDescriptorBody{Res: &types.CreateDescriptorResponse{
		Returnval: types.OvfCreateDescriptorResult{OvfDescriptor: "<Envelope/>"},
	}}
}
