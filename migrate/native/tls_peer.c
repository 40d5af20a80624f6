#include <arpa/inet.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <string.h>

#include "tls_internal.h"

static const char ROLE_URI[] = "urn:migrate:role:host";
static const unsigned NAME_FLAGS = X509_CHECK_FLAG_NEVER_CHECK_SUBJECT | X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS;

/* ---- HTTP/2 or nothing ---- */

const unsigned char MIG_TLS_PROTOCOL[3] = {2, 'h', '2'};

/* Without ALPN, OpenSSL would not ask which protocol. */
int mig_tls_on_hello(SSL *ssl, int *alert, void *unused)
{
    const unsigned char *extension;
    size_t bytes;

    (void)unused;
    if (SSL_client_hello_get0_ext(ssl, TLSEXT_TYPE_application_layer_protocol_negotiation, &extension, &bytes))
        return SSL_CLIENT_HELLO_SUCCESS;
    *alert = SSL_AD_NO_APPLICATION_PROTOCOL;
    return SSL_CLIENT_HELLO_ERROR;
}

int mig_tls_select_protocol(SSL *ssl, const unsigned char **ret, unsigned char *ret_bytes, const unsigned char *offered,
                            unsigned offered_bytes, void *unused)
{
    (void)ssl, (void)unused;
    for (unsigned at = 0; at < offered_bytes; at += 1u + offered[at]) {
        const size_t left_bytes = offered_bytes - at;
        if (left_bytes >= sizeof(MIG_TLS_PROTOCOL) &&
            memcmp(offered + at, MIG_TLS_PROTOCOL, sizeof(MIG_TLS_PROTOCOL)) == 0) {
            *ret = offered + at + 1;
            *ret_bytes = offered[at];
            return SSL_TLSEXT_ERR_OK;
        }
    }
    return SSL_TLSEXT_ERR_ALERT_FATAL;
}

bool mig_tls_is_protocol_chosen(const SSL *ssl)
{
    const unsigned char *chosen;
    unsigned bytes;

    SSL_get0_alpn_selected(ssl, &chosen, &bytes);
    return bytes == MIG_TLS_PROTOCOL[0] && memcmp(chosen, MIG_TLS_PROTOCOL + 1, bytes) == 0;
}

/* ---- who it is ---- */

static bool has_host_role(X509 *certificate)
{
    GENERAL_NAMES *names = X509_get_ext_d2i(certificate, NID_subject_alt_name, NULL, NULL);
    bool found = false;

    for (int i = 0; i < sk_GENERAL_NAME_num(names) && !found; i++) {
        const GENERAL_NAME *name = sk_GENERAL_NAME_value(names, i);
        if (name->type == GEN_URI) {
            const ASN1_IA5STRING *uri = name->d.uniformResourceIdentifier;
            found = ASN1_STRING_length(uri) == (int)strlen(ROLE_URI) &&
                    memcmp(ASN1_STRING_get0_data(uri), ROLE_URI, strlen(ROLE_URI)) == 0;
        }
    }
    GENERAL_NAMES_free(names);
    return found;
}

/* The chain, the name if one is set, the use, the role and the list. Returns the X509_V_ERR. */
static int verify(X509_STORE_CTX *store, const struct mig_credentials *credentials)
{
    if (X509_verify_cert(store) <= 0)
        return X509_STORE_CTX_get_error(store);
    X509 *certificate = X509_STORE_CTX_get0_cert(store);
    if (!has_host_role(certificate))
        X509_STORE_CTX_set_error(store, X509_V_ERR_CERT_REJECTED);
    else if (!mig_credentials_allow(credentials, certificate))
        X509_STORE_CTX_set_error(store, X509_V_ERR_CERT_REVOKED);
    return X509_STORE_CTX_get_error(store);
}

int mig_tls_verify(X509_STORE_CTX *store, void *unused)
{
    SSL *ssl = X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx());

    (void)unused;
    return verify(store, SSL_get_app_data(ssl)) == X509_V_OK;
}

/* Returns the X509_V_ERR, by what is trusted now. */
static int verify_again(const SSL *ssl, const struct mig_credentials *now)
{
    X509_STORE_CTX *store = X509_STORE_CTX_new();
    int result = X509_V_ERR_OUT_OF_MEM;

    if (store && X509_STORE_CTX_init(store, SSL_CTX_get_cert_store(now->context), SSL_get0_peer_certificate(ssl),
                                     SSL_get_peer_cert_chain(ssl))) {
        X509_VERIFY_PARAM *parameters = X509_STORE_CTX_get0_param(store);
        X509_STORE_CTX_set_default(store, SSL_is_server(ssl) ? "ssl_client" : "ssl_server");
        X509_VERIFY_PARAM_set1(parameters, SSL_get0_param((SSL *)ssl)); /* the name */
        X509_VERIFY_PARAM_set_auth_level(parameters, SSL_get_security_level(ssl));
        result = verify(store, now);
    }
    X509_STORE_CTX_free(store);
    ERR_clear_error();
    return result;
}

static bool is_address(const char *text)
{
    unsigned char parsed[16];
    return inet_pton(AF_INET, text, parsed) == 1 || inet_pton(AF_INET6, text, parsed) == 1;
}

/* OpenSSL takes no name for any name, and one with a dot in front for a whole domain. */
static bool is_name(const char *text)
{
    return text[0] && text[0] != '.';
}

bool mig_tls_expect_name(SSL *ssl, const char *server_name)
{
    X509_VERIFY_PARAM *parameters = SSL_get0_param(ssl);

    if (!is_name(server_name))
        return false;
    X509_VERIFY_PARAM_set_hostflags(parameters, NAME_FLAGS);
    if (is_address(server_name))
        return X509_VERIFY_PARAM_set1_ip_asc(parameters, server_name) == 1;
    return X509_VERIFY_PARAM_set1_host(parameters, server_name, 0) == 1 &&
           SSL_set_tlsext_host_name(ssl, server_name) == 1;
}

bool mig_tls_is_peer_named(const SSL *ssl, const char *name)
{
    X509 *certificate = SSL_get0_peer_certificate(ssl);

    if (!certificate || !is_name(name))
        return false;
    if (is_address(name))
        return X509_check_ip_asc(certificate, name, 0) == 1;
    return X509_check_host(certificate, name, 0, NAME_FLAGS, NULL) == 1;
}

/* ---- why not ---- */

/* What we have against the peer's certificate; NULL if it is all right. */
static const char *flaw_of_certificate(long result)
{
    switch (result) {
    case X509_V_OK:
        return NULL;
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
    case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
    case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
    case X509_V_ERR_CERT_SIGNATURE_FAILURE:
        return "certificate signed by an unknown authority";
    case X509_V_ERR_CERT_HAS_EXPIRED:
        return "certificate has expired";
    case X509_V_ERR_CERT_NOT_YET_VALID:
        return "certificate is not yet valid";
    case X509_V_ERR_HOSTNAME_MISMATCH:
    case X509_V_ERR_IP_ADDRESS_MISMATCH:
        return "wrong name: the certificate is for another host";
    case X509_V_ERR_INVALID_PURPOSE:
        return "certificate is not for this use";
    case X509_V_ERR_CERT_REJECTED:
        return "wrong role: the certificate is not a host's";
    case X509_V_ERR_CERT_REVOKED:
        return "certificate was revoked: it is not among the allowed peers";
    default:
        return X509_verify_cert_error_string(result);
    }
}

/* What the peer has against us; NULL if that is not what broke. */
static const char *words_of_alert(int alert)
{
    switch (alert) {
    case SSL_AD_BAD_CERTIFICATE:
        return "the peer refused our certificate: wrong name or role, or not yet valid";
    case SSL_AD_UNSUPPORTED_CERTIFICATE:
        return "the peer refused our certificate: not for this use";
    case SSL_AD_CERTIFICATE_REVOKED:
        return "the peer refused our certificate: revoked, or not among its allowed peers";
    case SSL_AD_CERTIFICATE_EXPIRED:
        return "the peer refused our certificate: expired";
    case SSL_AD_CERTIFICATE_UNKNOWN:
        return "the peer refused our certificate";
    case SSL_AD_UNKNOWN_CA:
        return "the peer refused our certificate: signed by an authority that is unknown there";
    case SSL_AD_CERTIFICATE_REQUIRED:
        return "the peer wants a certificate";
    case SSL_AD_PROTOCOL_VERSION:
        return "the peer does not speak TLS 1.3";
    case SSL_AD_NO_APPLICATION_PROTOCOL:
        return "the peer does not speak HTTP/2 (ALPN h2)";
    default:
        return NULL;
    }
}

const char *mig_tls_why_not_now(const SSL *ssl, const struct mig_credentials *now)
{
    return flaw_of_certificate(verify_again(ssl, now));
}

const char *mig_tls_words(const SSL *ssl)
{
    const int reason = ERR_GET_REASON(ERR_peek_error());
    const char *flaw = flaw_of_certificate(SSL_get_verify_result(ssl));

    if (reason > SSL_AD_REASON_OFFSET && words_of_alert(reason - SSL_AD_REASON_OFFSET))
        return words_of_alert(reason - SSL_AD_REASON_OFFSET);
    switch (reason) {
    case SSL_R_CERTIFICATE_VERIFY_FAILED:
        return flaw ? flaw : "certificate cannot be verified";
    case SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE:
        return "no client certificate";
    case SSL_R_UNSUPPORTED_PROTOCOL:
    case SSL_R_UNSUPPORTED_SSL_VERSION:
    case SSL_R_WRONG_SSL_VERSION:
    case SSL_R_VERSION_TOO_LOW:
        return "the peer does not speak TLS 1.3";
    case SSL_R_NO_APPLICATION_PROTOCOL:
    case SSL_R_CALLBACK_FAILED: /* of mig_tls_on_hello */
        return "the peer does not speak HTTP/2 (ALPN h2)";
    default:
        return mig_tls_first_error();
    }
}
