package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// ours marks requests of this program's own client, which no fault hits.
const ours = "vcsim-inspector"

// front stands before the simulator.
type front struct {
	service *simulator.Service
	url     *url.URL
	inner   http.Handler

	mu       sync.Mutex
	calls    map[string]int
	leases   map[string]*lease
	cutAfter int64
	cutTimes int
	pace     int64
	away     int
	imports  int
	tokens   map[string]bool   // REST sessions that were seen; false once they are expired
	clones   map[string]string // machines that were cloned, by the name of the clone
	exports  map[string]string // files that leases give away
}

// lease is an import that is not complete.
type lease struct {
	machine  types.ManagedObjectReference
	progress time.Time
	uploaded map[string]int64
	over     bool
	timedOut bool
}

func newFront(service *simulator.Service, address *url.URL, inner http.Handler) *front {
	return &front{
		service: service, url: address, inner: inner,
		calls: map[string]int{}, leases: map[string]*lease{}, tokens: map[string]bool{},
		clones: map[string]string{}, exports: map[string]string{},
	}
}

func (f *front) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case strings.HasPrefix(r.URL.Path, "/vcsim/"):
		f.control(w, r)
	case r.UserAgent() == ours:
		f.inner.ServeHTTP(w, r)
	case f.isAway():
		http.Error(w, "503 Service Unavailable (the service is starting)", http.StatusServiceUnavailable)
	case strings.HasPrefix(r.URL.Path, "/sdk"):
		f.soap(w, r)
	case strings.HasPrefix(r.URL.Path, "/nfc/"):
		f.upload(w, r)
	default:
		f.rest(w, r)
	}
}

func (f *front) isAway() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.away > 0 {
		f.away--
		return true
	}
	return false
}

func (f *front) control(w http.ResponseWriter, r *http.Request) {
	var body struct {
		Method, Fault  string
		Count          int
		After          int64
		Times          int
		BytesPerSecond int64
		Requests       int
	}
	if r.Method == http.MethodPost {
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch r.URL.Path {
	case "/vcsim/inventory":
		f.mu.Unlock()
		answer, err := f.inventory()
		f.mu.Lock()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		_ = json.NewEncoder(w).Encode(answer)
	case "/vcsim/calls":
		_ = json.NewEncoder(w).Encode(f.calls)
	case "/vcsim/fault":
		fault, ok := faults[body.Fault]
		if !ok {
			http.Error(w, "unknown fault "+body.Fault, http.StatusBadRequest)
			return
		}
		f.service.AddFaultRule(&simulator.FaultInjectionRule{
			MethodName: body.Method, ObjectType: "*", ObjectName: "*", Probability: 1, MaxCount: body.Count,
			FaultType: simulator.FaultTypeCustom, Fault: fault, Message: body.Fault, Enabled: true,
		})
	case "/vcsim/cut":
		f.cutAfter, f.cutTimes = body.After, body.Times
	case "/vcsim/slow":
		f.pace = body.BytesPerSecond
	case "/vcsim/away":
		f.away = body.Requests
	case "/vcsim/expire":
		for token := range f.tokens {
			f.tokens[token] = false
		}
		f.mu.Unlock()
		err := f.endSessions()
		f.mu.Lock()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	default:
		http.NotFound(w, r)
	}
}

var faults = map[string]types.BaseMethodFault{
	"NoDiskSpace":  &types.NoDiskSpace{Datastore: "LocalDS_0"},
	"NoPermission": &types.NoPermission{PrivilegeId: "VApp.Import"},
	"Timedout":     &types.Timedout{},
	"SystemError":  &types.SystemError{Reason: "vpxd is tired"},
}

var (
	method   = regexp.MustCompile(`<(?:\w+:)?Body>\s*<(?:\w+:)?(\w+)`)
	leaseRef = regexp.MustCompile(`<_this type="HttpNfcLease">([^<]+)<`)
	entity   = regexp.MustCompile(`<entity [^>]*type="VirtualMachine"[^>]*>([^<]+)<`)
	// "[datastore] directory/disk-0.vmdk", and "[datastore]" where vCenter is to choose.
	diskPath    = regexp.MustCompile(`(\[[^]/<]+\]) ?[^/<\s]+/`)
	machinePath = regexp.MustCompile(`<vmPathName>(\[[^]/<]+\])\s*<`)
	limit       = regexp.MustCompile(`<leaseTimeout>\d+<`)
	leaseURL    = regexp.MustCompile(`/nfc/([^/]+)/`)
)

// soap counts calls, and gives leases the time limit that the real vCenter enforces.
func (f *front) soap(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	name, id := submatch(method, body), submatch(leaseRef, body)
	f.mu.Lock()
	f.calls[name]++
	if name == "ImportVApp" {
		// vCenter makes a directory of its own for each machine.
		f.imports++
		own := fmt.Sprintf("import_%d", f.imports)
		body = diskPath.ReplaceAll(body, fmt.Appendf(nil, "$1 %s/", own))
		body = machinePath.ReplaceAll(body, fmt.Appendf(nil, "<vmPathName>$1 %s/%s.vmx<", own, own))
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	}
	held := f.leases[id]
	timedOut := held != nil && held.timedOut
	if held != nil && name == "HttpNfcLeaseProgress" && !held.over {
		held.progress = time.Now()
	}
	f.mu.Unlock()
	if timedOut {
		w.Header().Set("Content-Type", "text/xml")
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = io.WriteString(w, timeoutFault)
		return
	}

	recorder := httptest.NewRecorder()
	f.inner.ServeHTTP(recorder, r)
	answer := recorder.Body.Bytes()
	if machine := submatch(entity, answer); machine != "" && limit.Match(answer) {
		// In the URL the brackets of a lease's name are escaped.
		if id, err := url.PathUnescape(submatch(leaseURL, answer)); err == nil && f.export(id) == "" {
			f.hold(id, machine)
		}
		answer = limit.ReplaceAll(answer, []byte(fmt.Sprintf("<leaseTimeout>%d<", *leaseTimeout)))
	}
	if held != nil && recorder.Code == http.StatusOK {
		switch name {
		case "HttpNfcLeaseAbort":
			f.undo(held)
		case "HttpNfcLeaseComplete":
			f.mu.Lock()
			held.over = true
			f.mu.Unlock()
		}
	}
	for key, values := range recorder.Header() {
		w.Header()[key] = values
	}
	w.WriteHeader(recorder.Code)
	_, _ = w.Write(answer)
}

const timeoutFault = `<?xml version="1.0" encoding="UTF-8"?>
<soapenv:Envelope xmlns:soapenv="http://schemas.xmlsoap.org/soap/envelope/"
 xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance"><soapenv:Body><soapenv:Fault>
<faultcode>ServerFaultCode</faultcode><faultstring>the lease timed out</faultstring>
<detail><TimedoutFault xmlns="urn:vim25" xsi:type="Timedout"/></detail>
</soapenv:Fault></soapenv:Body></soapenv:Envelope>`

func submatch(pattern *regexp.Regexp, text []byte) string {
	if found := pattern.FindSubmatch(text); found != nil {
		return string(found[1])
	}
	return ""
}

// hold watches a lease: without progress the import is undone.
func (f *front) hold(id, machine string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.leases[id] != nil {
		return
	}
	held := &lease{
		machine:  types.ManagedObjectReference{Type: "VirtualMachine", Value: machine},
		progress: time.Now(), uploaded: map[string]int64{},
	}
	f.leases[id] = held
	go func() {
		for {
			f.mu.Lock()
			left, over := time.Until(held.progress.Add(leaseLimit())), held.over
			f.mu.Unlock()
			switch {
			case over:
				return
			case left <= 0:
				f.mu.Lock()
				held.timedOut = true
				f.mu.Unlock()
				f.undo(held)
				return
			}
			time.Sleep(left)
		}
	}()
}

// undo removes the machine of an import that ended early, as vCenter does.
func (f *front) undo(held *lease) {
	f.mu.Lock()
	held.over = true
	f.mu.Unlock()
	_ = f.withClient(func(ctx context.Context, client *vim25.Client) error {
		task, err := object.NewVirtualMachine(client, held.machine).Destroy(ctx)
		if err != nil {
			return err
		}
		return task.Wait(ctx)
	})
}

// export is the file that a lease gives away.
func (f *front) export(id string) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.exports[id]
}

// upload keeps the disk, which the simulator only counts.
func (f *front) upload(w http.ResponseWriter, r *http.Request) {
	parts := strings.Split(r.URL.Path, "/")
	id, name := parts[len(parts)-2], parts[len(parts)-1]
	if file := f.export(id); file != "" && r.Method == http.MethodGet {
		http.ServeFile(w, r, file)
		return
	}
	f.mu.Lock()
	held, pace := f.leases[id], f.pace
	cut := int64(-1)
	if f.cutTimes > 0 {
		f.cutTimes--
		cut = f.cutAfter
	}
	f.mu.Unlock()
	switch {
	case held == nil || held.over:
		http.NotFound(w, r)
		return
	case r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/x-vnd.vmware-streamVmdk":
		http.Error(w, "a disk is posted as application/x-vnd.vmware-streamVmdk", http.StatusBadRequest)
		return
	case r.ContentLength < 0:
		http.Error(w, "the length is unknown", http.StatusLengthRequired)
		return
	}
	var out io.Writer = io.Discard
	if *disks != "" {
		file, err := os.Create(filepath.Join(*disks, held.machine.Value+"-"+name))
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		defer file.Close()
		out = file
	}
	var body io.Reader = r.Body
	if pace > 0 {
		body = &slow{body, pace}
	}
	if cut >= 0 {
		_, _ = io.CopyN(out, body, cut)
		if hijacker, ok := w.(http.Hijacker); ok {
			if connection, _, err := hijacker.Hijack(); err == nil {
				_ = connection.Close()
			}
		}
		return
	}
	n, err := io.Copy(out, body)
	if err != nil {
		return
	}
	f.mu.Lock()
	held.uploaded[name] = n
	f.mu.Unlock()
	w.WriteHeader(http.StatusOK)
}

type slow struct {
	io.Reader
	pace int64
}

func (s *slow) Read(into []byte) (int, error) {
	n, err := s.Reader.Read(into[:min(len(into), 16<<10)])
	time.Sleep(time.Duration(n) * time.Second / time.Duration(s.pace))
	return n, err
}

// rest refuses expired sessions.
func (f *front) rest(w http.ResponseWriter, r *http.Request) {
	token := r.Header.Get("vmware-api-session-id")
	if strings.Contains(r.URL.Path, "/cis/data/") {
		token = "" // That of an upload, which is no session.
	}
	f.mu.Lock()
	f.calls[r.Method+" "+r.URL.Path]++
	if token != "" {
		if _, seen := f.tokens[token]; !seen {
			f.tokens[token] = true
		}
	}
	if f.pace > 0 && r.Method == http.MethodPut {
		r.Body = io.NopCloser(&slow{r.Body, f.pace})
	}
	expired := token != "" && !f.tokens[token]
	if r.Method == http.MethodDelete && strings.HasSuffix(r.URL.Path, "/cis/session") {
		delete(f.tokens, token)
	}
	f.mu.Unlock()
	if expired {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	f.inner.ServeHTTP(w, r)
}

func (f *front) withClient(do func(context.Context, *vim25.Client) error) error {
	ctx := context.Background()
	soapClient := newSoapClient(f.url)
	client, err := vim25.NewClient(ctx, soapClient)
	if err != nil {
		return err
	}
	manager := session.NewManager(client)
	if err := manager.Login(ctx, url.UserPassword(*username, *password)); err != nil {
		return err
	}
	defer func() { _ = manager.Logout(ctx) }()
	return do(ctx, client)
}

// endSessions ends every session but its own.
func (f *front) endSessions() error {
	return f.withClient(func(ctx context.Context, client *vim25.Client) error {
		sessions, own, err := otherSessions(ctx, client)
		if err != nil {
			return err
		}
		var ids []string
		for _, session := range sessions {
			if session.Key != own {
				ids = append(ids, session.Key)
			}
		}
		if len(ids) == 0 {
			return nil
		}
		return session.NewManager(client).TerminateSession(ctx, ids)
	})
}

func otherSessions(ctx context.Context, client *vim25.Client) ([]types.UserSession, string, error) {
	var manager mo.SessionManager
	c := govmomi.Client{Client: client, SessionManager: session.NewManager(client)}
	err := c.RetrieveOne(ctx, *client.ServiceContent.SessionManager, []string{"sessionList", "currentSession"}, &manager)
	if err != nil {
		return nil, "", err
	}
	return manager.SessionList, manager.CurrentSession.Key, nil
}
