/* Preloaded with LD_PRELOAD: ends the program at a copy of more than MAX_TO_HOST bytes from the GPU to
 * the host. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

static void check(size_t bytes) {
  const char *most = getenv("MAX_TO_HOST");
  if (!most || bytes <= strtoull(most, NULL, 10)) return;
  fprintf(stderr, "to_host: a copy of %zu bytes from the GPU, allowed are %s\n", bytes, most);
  _Exit(99);
}

#define WATCH(name, params, args)                           \
  int name params {                                         \
    int(*next) params = (int(*) params)dlsym(RTLD_NEXT, #name); \
    check(bytes);                                           \
    return next args;                                       \
  }

WATCH(cuMemcpyDtoH_v2, (void *to, unsigned long long from, size_t bytes), (to, from, bytes))
WATCH(cuMemcpyDtoHAsync_v2, (void *to, unsigned long long from, size_t bytes, void *stream),
      (to, from, bytes, stream))
