/*
 * A multiboot kernel that does nothing but leave ring 0: paging, long mode, then CPL 3 for good.
 *
 * The registers are those that migrate/native/kvm.c gives its guest, so that both run natively on the same hosts. There
 * is no interrupt table: nothing may interrupt (all lines are masked, IF is clear), and the workload never faults.
 */
#define MULTIBOOT_MAGIC 0x1badb002
#define MULTIBOOT_FLAGS 0

#define KERNEL_CODE 0x08
#define KERNEL_DATA 0x10
#define USER_DATA 0x2b
#define USER_CODE 0x33
#define TASK 0x38

#define PTE_TABLE 0x07 /* present, writable, user */
#define PTE_HUGE 0x87
#define MAPPED_GIBS 4

        .section .multiboot, "a"
        .align 4
        .long MULTIBOOT_MAGIC
        .long MULTIBOOT_FLAGS
        .long -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)

        .text
        .code32
        .globl start
start:
        cli
        cld
        movb $0xff, %al
        outb %al, $0x21
        outb %al, $0xa1

        /* Identity map of 2 MiB pages. The tables are zeroed by the loader, and less than 4 GiB is mapped. */
        movl $pdpt + PTE_TABLE, pml4
        movl $pd + PTE_TABLE, %eax
        xorl %ecx, %ecx
1:      movl %eax, pdpt(, %ecx, 8)
        addl $0x1000, %eax
        incl %ecx
        cmpl $MAPPED_GIBS, %ecx
        jne 1b
        movl $PTE_HUGE, %eax
        xorl %ecx, %ecx
2:      movl %eax, pd(, %ecx, 8)
        addl $0x200000, %eax
        incl %ecx
        cmpl $512 * MAPPED_GIBS, %ecx
        jne 2b

        movl $pml4, %eax
        movl %eax, %cr3
        movl $0x620, %eax /* OSXMMEXCPT OSFXSR PAE */
        movl %eax, %cr4
        movl $0xc0000080, %ecx
        movl $0x901, %eax /* NXE LME SCE; LMA follows from PG */
        xorl %edx, %edx
        wrmsr
        movl $0x80050033, %eax /* PG AM WP NE ET MP PE */
        movl %eax, %cr0
        lgdt gdt_pointer
        ljmp $KERNEL_CODE, $long_mode

        .code64
long_mode:
        movl $KERNEL_DATA, %eax
        movl %eax, %ss
        xorl %eax, %eax
        lldt %ax
        movl $TASK, %eax
        ltr %ax
        movl $USER_DATA, %eax
        movl %eax, %ds
        movl %eax, %es
        movl %eax, %fs
        movl %eax, %gs
        fninit
        movq $stack_end, %rsp
        pushq $USER_DATA
        /* As after a call: 16-byte aligned before the return address. */
        pushq $stack_end - 8
        pushq $0x2
        pushq $USER_CODE
        pushq $guest_main
        iretq

        .data
        .align 16
gdt:
        .quad 0
        .quad 0x00af9b000000ffff /* 0x08: code, 64 bit, ring 0 */
        .quad 0x00cf93000000ffff /* 0x10: data, ring 0 */
        .quad 0
        .quad 0
        .quad 0x00cff3000000ffff /* 0x28: data, ring 3 */
        .quad 0x00affb000000ffff /* 0x30: code, 64 bit, ring 3 */
        .quad 0x0000890000000067 /* 0x38: a task segment of 104 bytes at 0, which nothing ever uses */
        .quad 0
gdt_pointer:
        .word gdt_pointer - gdt - 1
        .long gdt

        .bss
        .align 4096
pml4:   .skip 4096
pdpt:   .skip 4096
pd:     .skip 4096 * MAPPED_GIBS
stack:  .skip 8192
stack_end:

        .section .note.GNU-stack, "", @progbits
