// What the files on memory share.
#ifndef MEM_H
#define MEM_H
#include "selfcheck.h"
#include <sys/mman.h>

enum { PAGE = 4096, RW = PROT_READ | PROT_WRITE, PA = MAP_PRIVATE | MAP_ANONYMOUS, SA = MAP_SHARED | MAP_ANONYMOUS, HUGE = 2 << 20 };

bool readable(const void *p); // a byte, without a signal
void put(unsigned char *p, size_t len, uint64_t seed);
void same(const char *name, unsigned char *p, size_t from, size_t to, uint64_t seed);
bool has_flag(const void *p, const char *flag); // among VmFlags of the mapping at p
char *flags_of(const void *p); // all of them, in a static buffer
long nr_huge(long set); // vm.nr_hugepages, which it sets unless set is negative
void reserve_huge(int pages); // more than there were
void unreserve_huge(void);
uint64_t mix(uint64_t a, uint64_t b, uint64_t c); // a word that looks like noise
#endif
