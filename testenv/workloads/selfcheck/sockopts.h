// Options of sockets that must stay as they are.
#ifndef SOCKOPTS_H
#define SOCKOPTS_H
#include "selfcheck.h"
#include <sys/socket.h>

void so_set(int fd, int level, int name, int v);
void so_bytes(int fd, int level, int name, const void *p, socklen_t n);
// so_hold remembers an option, of up to 64 bytes, for so_recheck, which
// rechecks descriptors and addresses, too.
void so_hold(int fd, int level, int name);
void so_put(int fd, int level, int name, int v); // so_set and so_hold
void so_name(int fd);                            // the address
void so_recheck(void);
void so_expect(int fd, const char *want, const char *what); // a datagram that comes within a second
void so_silent(int fd, const char *what);                   // none is there
#endif
