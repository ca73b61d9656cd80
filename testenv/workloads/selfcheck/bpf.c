// BPF maps: arrays and hash tables, frozen ones, descriptors that may only read.
#include "selfcheck.h"
#include <linux/bpf.h>

static long bpf_call(int cmd, union bpf_attr *a) { return syscall(SYS_bpf, cmd, a, sizeof *a); }

static int bpf_map(int type, int key, int value, int entries, int flags, const char *name) {
	union bpf_attr a = {.map_type = type, .key_size = key, .value_size = value, .max_entries = entries, .map_flags = flags};
	strcpy(a.map_name, name);
	int fd = bpf_call(BPF_MAP_CREATE, &a);
	CHECK(fd >= 0, "create map %s: %s", name, strerror(errno));
	remember(name, fd);
	return fd;
}

static long bpf_elem(int cmd, int fd, const void *key, void *value) {
	union bpf_attr a = {.map_fd = fd, .key = (uintptr_t)key, .value = (uintptr_t)value};
	return bpf_call(cmd, &a);
}

static struct bpf_map_info bpf_info(int fd) {
	struct bpf_map_info i = {0};
	union bpf_attr a = {.info = {.bpf_fd = fd, .info_len = sizeof i, .info = (uintptr_t)&i}};
	CHECK(bpf_call(BPF_OBJ_GET_INFO_BY_FD, &a) == 0, "information of a map: %s", strerror(errno));
	return i;
}

static int bpf_again(int fd, int flags) {
	union bpf_attr a = {.map_id = bpf_info(fd).id, .open_flags = flags};
	int n = bpf_call(BPF_MAP_GET_FD_BY_ID, &a);
	CHECK(n >= 0, "open a map again: %s", strerror(errno));
	remember("map again", n);
	return n;
}

struct wide { uint64_t a, b; char text[20]; };

static int array, hash, frozen, full, reader, empty, rdonly;
static struct bpf_map_info was[7];

static void bpf_check(void) {
	recheck();
	static uint64_t rounds;
	int all[] = {array, hash, frozen, full, reader, empty, rdonly};
	for (int i = 0; i < 7; i++) {
		struct bpf_map_info n = bpf_info(all[i]);
		CHECK(n.type == was[i].type && n.key_size == was[i].key_size && n.value_size == was[i].value_size && n.max_entries == was[i].max_entries &&
			n.map_flags == was[i].map_flags && strcmp(n.name, was[i].name) == 0, "map %s has changed", was[i].name);
	}
	CHECK(bpf_info(reader).id == bpf_info(hash).id, "two descriptors of one map lead to two");
	for (uint32_t k = 0; k < 100; k++) {
		uint64_t v = 0;
		CHECK(bpf_elem(BPF_MAP_LOOKUP_ELEM, array, &k, &v) == 0 && v == (k == 7 ? rounds : k * 3), "element %u of the array is %lu", k, v);
	}
	for (uint64_t k = 0; k < 500; k++) {
		struct wide w = {0};
		uint64_t key = k * 0x9E3779B97F4A7C15u;
		CHECK(bpf_elem(BPF_MAP_LOOKUP_ELEM, reader, &key, &w) == 0 && w.a == k && w.b == ~k && strcmp(w.text, "wide") == 0, "element %lu of the hash table is lost", k);
	}
	uint32_t k = 7;
	uint64_t v = ++rounds;
	CHECK(bpf_elem(BPF_MAP_UPDATE_ELEM, array, &k, &v) == 0, "the array cannot be written: %s", strerror(errno));
	CHECK(bpf_elem(BPF_MAP_UPDATE_ELEM, frozen, &k, &v) < 0 && errno == EPERM, "a frozen map can be written");
	CHECK(bpf_elem(BPF_MAP_LOOKUP_ELEM, frozen, &k, &v) == 0 && v == 4711, "a frozen map holds %lu", v);
	CHECK(bpf_elem(BPF_MAP_UPDATE_ELEM, rdonly, &k, &v) < 0 && errno == EPERM, "a descriptor for reading writes");
	uint64_t other = 1;
	struct wide w = {0};
	CHECK(bpf_elem(BPF_MAP_UPDATE_ELEM, reader, &other, &w) < 0 && errno == EPERM, "a descriptor for reading writes");
	k = 99;
	CHECK(bpf_elem(BPF_MAP_UPDATE_ELEM, full, &k, &v) < 0 && errno == E2BIG, "a full map takes more");
	CHECK(bpf_elem(BPF_MAP_LOOKUP_ELEM, empty, &k, &v) < 0 && errno == ENOENT, "an empty map has an element");
}

COMMAND(bpfmap) {
	array = bpf_map(BPF_MAP_TYPE_ARRAY, 4, 8, 100, 0, "an_array");
	hash = bpf_map(BPF_MAP_TYPE_HASH, 8, sizeof(struct wide), 1000, BPF_F_NO_PREALLOC, "a_hash");
	frozen = bpf_map(BPF_MAP_TYPE_ARRAY, 4, 8, 8, BPF_F_RDONLY_PROG, "frozen");
	full = bpf_map(BPF_MAP_TYPE_HASH, 4, 8, 3, 0, "full");
	empty = bpf_map(BPF_MAP_TYPE_HASH, 4, 8, 64, 0, "");
	rdonly = bpf_map(BPF_MAP_TYPE_ARRAY, 4, 8, 8, BPF_F_RDONLY, "rdonly");
	reader = bpf_again(hash, BPF_F_RDONLY);
	for (uint32_t k = 0; k < 100; k++) {
		uint64_t v = k == 7 ? 0 : k * 3;
		CHECK(bpf_elem(BPF_MAP_UPDATE_ELEM, array, &k, &v) == 0, "fill the array: %s", strerror(errno));
		if (k < 3) CHECK(bpf_elem(BPF_MAP_UPDATE_ELEM, full, &k, &v) == 0, "fill the map: %s", strerror(errno));
	}
	for (uint64_t k = 0; k < 500; k++) {
		struct wide w = {k, ~k, "wide"};
		uint64_t key = k * 0x9E3779B97F4A7C15u;
		CHECK(bpf_elem(BPF_MAP_UPDATE_ELEM, hash, &key, &w) == 0, "fill the hash table: %s", strerror(errno));
	}
	uint32_t k = 7;
	uint64_t v = 4711;
	CHECK(bpf_elem(BPF_MAP_UPDATE_ELEM, frozen, &k, &v) == 0, "fill the map: %s", strerror(errno));
	union bpf_attr a = {.map_fd = frozen};
	CHECK(bpf_call(BPF_MAP_FREEZE, &a) == 0, "freeze: %s", strerror(errno));
	int all[] = {array, hash, frozen, full, reader, empty, rdonly};
	for (int i = 0; i < 7; i++) was[i] = bpf_info(all[i]);
	loop(bpf_check);
}
