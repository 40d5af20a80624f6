/* All that Python may see of the C core. Declarations repeat the headers; cffi checks them when it compiles. */

/* ---- paging: uffd.h, bitmap.h, pager.h, pageserver.h, digest.h ---- */

/* ---- machines: mailbox.h, payload.h, kvm.h, vcpu.h ---- */
