package sharefs_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"runv/internal/sharefs"
)

// twoShares serve the same directory to two guests; the volume in it is coherent. It returns the volume's path on the host
// and in each of the guests.
func twoShares(t *testing.T) (host string, guests [2]string) {
	t.Helper()
	root := t.TempDir()
	volume := "v" + sharefs.CoherentSuffix
	host = filepath.Join(root, volume)
	assert.NilError(t, os.Mkdir(host, 0o777))
	for i := range guests {
		mounted, _ := share(t, root, defaults())
		guests[i] = filepath.Join(mounted, volume)
	}
	return host, guests
}

// Changes that follow each other faster than the clock for time stamps ticks, and do not change the size, are seen at once.
func TestReaderSeesEachChange(t *testing.T) {
	host, guests := twoShares(t)
	for name, writerPath := range map[string]string{"host": host, "guest": guests[1]} {
		t.Run(name, func(t *testing.T) {
			path := "file-" + name
			assert.NilError(t, os.WriteFile(filepath.Join(host, path), make([]byte, 8), 0o666))
			reader, err := os.Open(filepath.Join(guests[0], path))
			assert.NilError(t, err)
			defer reader.Close()
			writer, err := os.OpenFile(filepath.Join(writerPath, path), os.O_WRONLY, 0)
			assert.NilError(t, err)
			defer writer.Close()
			var buf [8]byte
			for i := range uint64(3000) {
				_, err := writer.WriteAt(binary.LittleEndian.AppendUint64(nil, i), 0)
				assert.NilError(t, err)
				if i%3 == 0 { // the reader must not depend on the writer's pace
					_, err = reader.ReadAt(buf[:], 0)
					assert.NilError(t, err)
				}
				if i%7 == 0 {
					_, err := reader.Stat() // the true time, which is an older answer to the guest's kernel
					assert.NilError(t, err)
				}
				_, err = reader.ReadAt(buf[:], 0)
				assert.NilError(t, err)
				assert.Equal(t, binary.LittleEndian.Uint64(buf[:]), i)
			}
		})
	}
}

// A writer that sets the modification time back hides nothing.
func TestReaderSeesChangeWithOldTime(t *testing.T) {
	host, guests := twoShares(t)
	path := filepath.Join(host, "file")
	old := time.Unix(1000, 0)
	assert.NilError(t, os.WriteFile(path, []byte("one"), 0o666))
	assert.NilError(t, os.Chtimes(path, old, old))
	awaitRest(t, path)
	reader, err := os.Open(filepath.Join(guests[0], "file"))
	assert.NilError(t, err)
	defer reader.Close()
	buf := make([]byte, 3)
	for _, content := range []string{"two", "six", "ten"} {
		_, err = reader.ReadAt(buf, 0)
		assert.NilError(t, err)
		writer, err := os.OpenFile(path, os.O_WRONLY, 0)
		assert.NilError(t, err)
		_, err = writer.WriteString(content)
		assert.NilError(t, err)
		assert.NilError(t, writer.Close())
		assert.NilError(t, os.Chtimes(path, old, old))
		awaitRest(t, path)
		_, err = reader.ReadAt(buf, 0)
		assert.NilError(t, err)
		assert.Equal(t, string(buf), content)
	}
}

// awaitRest waits until the last change of a file is so long ago that another one has other times.
func awaitRest(t *testing.T, path string) {
	t.Helper()
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return poll.Error(err)
		}
		if time.Since(time.Unix(st.Ctim.Unix())) < 100*time.Millisecond {
			return poll.Continue("changed just now")
		}
		return poll.Success()
	}, poll.WithDelay(5*time.Millisecond))
}

// stat(2) tells the time that the host's file has, whatever the guest's kernel was told for its cache.
func TestStatTellsTrueTimes(t *testing.T) {
	host, guests := twoShares(t)
	path := filepath.Join(host, "file")
	assert.NilError(t, os.WriteFile(path, []byte("x"), 0o666))
	reader, err := os.Open(filepath.Join(guests[0], "file"))
	assert.NilError(t, err)
	defer reader.Close()
	for range 100 {
		assert.NilError(t, os.WriteFile(path, []byte("x"), 0o666))
		_, err := reader.ReadAt(make([]byte, 1), 0)
		assert.NilError(t, err)
		var onHost, inGuest unix.Stat_t
		assert.NilError(t, unix.Stat(path, &onHost))
		assert.NilError(t, unix.Fstat(int(reader.Fd()), &inGuest))
		assert.Equal(t, inGuest.Mtim, onHost.Mtim)
		assert.NilError(t, unix.Stat(filepath.Join(guests[0], "file"), &inGuest))
		assert.Equal(t, inGuest.Mtim, onHost.Mtim)
	}
}

// A name that comes, goes and is replaced is seen at once.
func TestNamesAreCoherent(t *testing.T) {
	host, guests := twoShares(t)
	for i := range 200 {
		name := fmt.Sprint("n", i)
		_, err := os.Stat(filepath.Join(guests[0], name))
		assert.ErrorIs(t, err, os.ErrNotExist)
		assert.NilError(t, os.WriteFile(filepath.Join(guests[1], name), []byte("1"), 0o666))
		read(t, filepath.Join(guests[0], name), "1")
		assert.NilError(t, os.WriteFile(filepath.Join(host, "new"), []byte("2"), 0o666))
		assert.NilError(t, os.Rename(filepath.Join(host, "new"), filepath.Join(host, name)))
		read(t, filepath.Join(guests[0], name), "2")
		assert.NilError(t, os.Remove(filepath.Join(guests[0], name)))
		_, err = os.Stat(filepath.Join(guests[1], name))
		assert.ErrorIs(t, err, os.ErrNotExist)
	}
}

func read(t *testing.T, path, want string) {
	t.Helper()
	data, err := os.ReadFile(path)
	assert.NilError(t, err)
	assert.Equal(t, string(data), want)
}

// Programs of two guests and of the host count in one file, each under a lock.
func TestLocksHoldBetweenGuests(t *testing.T) {
	host, guests := twoShares(t)
	places := []string{host, guests[0], guests[1], guests[0]}
	const rounds = 100
	lock := map[string]func(f *os.File, kind int16) error{
		"flock": func(f *os.File, kind int16) error {
			return unix.Flock(int(f.Fd()), map[int16]int{unix.F_WRLCK: unix.LOCK_EX, unix.F_UNLCK: unix.LOCK_UN}[kind])
		},
		"record": func(f *os.File, kind int16) error { // of the open file, as goroutines are one process
			return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLKW, &unix.Flock_t{Type: kind})
		},
	}
	for name, set := range lock {
		t.Run(name, func(t *testing.T) {
			path := "counter-" + name
			assert.NilError(t, os.WriteFile(filepath.Join(host, path), make([]byte, 8), 0o666))
			var wg sync.WaitGroup
			for _, place := range places {
				wg.Go(func() {
					f, err := os.OpenFile(filepath.Join(place, path), os.O_RDWR, 0)
					if err != nil {
						t.Error(err)
						return
					}
					defer f.Close()
					for range rounds {
						if err := count(f, set); err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			data, err := os.ReadFile(filepath.Join(host, path))
			assert.NilError(t, err)
			assert.Equal(t, binary.LittleEndian.Uint64(data), uint64(len(places)*rounds))
		})
	}
}

func count(f *os.File, set func(f *os.File, kind int16) error) error {
	for {
		if err := set(f, unix.F_WRLCK); err == unix.EINTR { //nolint:errorlint // as the kernel returns it
			continue
		} else if err != nil {
			return err
		}
		break
	}
	var buf [8]byte
	if _, err := f.ReadAt(buf[:], 0); err != nil {
		return err
	}
	if _, err := f.WriteAt(binary.LittleEndian.AppendUint64(nil, binary.LittleEndian.Uint64(buf[:])+1), 0); err != nil {
		return err
	}
	return set(f, unix.F_UNLCK)
}

// Appends of all writers are whole, and none is lost.
func TestAppendsAreWhole(t *testing.T) {
	host, guests := twoShares(t)
	const rounds = 200
	var wg sync.WaitGroup
	for i, place := range []string{host, guests[0], guests[1]} {
		wg.Go(func() {
			f, err := os.OpenFile(filepath.Join(place, "log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o666)
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close()
			for range rounds {
				if _, err := fmt.Fprintf(f, "writer %d\n", i); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	for _, place := range []string{host, guests[0], guests[1]} {
		data, err := os.ReadFile(filepath.Join(place, "log"))
		assert.NilError(t, err)
		assert.Equal(t, len(data), 3*rounds*len("writer 0\n"))
	}
}

// Pages that are mapped and changed reach the host, at their own place even when the file was opened for appending as well.
func TestMappedPages(t *testing.T) {
	host, guests := twoShares(t)
	path := filepath.Join(guests[0], "file")
	assert.NilError(t, os.WriteFile(path, make([]byte, 8192), 0o666))
	for _, flags := range []int{os.O_RDWR, os.O_RDWR | os.O_APPEND} {
		f, err := os.OpenFile(path, flags, 0)
		assert.NilError(t, err)
		pages, err := unix.Mmap(int(f.Fd()), 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		assert.NilError(t, err)
		pages[0]++
		pages[5000]++
		assert.NilError(t, unix.Msync(pages, unix.MS_SYNC))
		data, err := os.ReadFile(filepath.Join(host, "file"))
		assert.NilError(t, err)
		assert.Equal(t, len(data), 8192)
		assert.Equal(t, [2]byte{data[0], data[5000]}, [2]byte{pages[0], pages[5000]})
		assert.NilError(t, unix.Munmap(pages))
		assert.NilError(t, f.Close())
	}
}
