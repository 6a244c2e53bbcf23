/* dlpack.h - how tensors of other libraries tell where they lie: what is read of DLPack's C interface. */
#ifndef GSGD_DLPACK_H
#define GSGD_DLPACK_H

#include <stdint.h>

enum { DLPACK_MAJOR = 1, DLPACK_CPU = 1, DLPACK_FLOAT = 2 };

/* DLTensor: a view, as long as the tensor lives and is not changed. Strides are in entries. */
typedef struct {
    void *data;
    struct {
        int32_t type, number;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} dlpack_tensor;

/* DLPackExchangeAPI: what a type of tensors has as "__dlpack_c_exchange_api__", for good. */
typedef struct dlpack_exchange {
    uint32_t major, minor;
    const struct dlpack_exchange *older;
    void (*unused[3])(void);
    int (*view)(void *object, dlpack_tensor *to); /* 0, or -1 with an exception set; may be NULL */
} dlpack_exchange;

#endif
